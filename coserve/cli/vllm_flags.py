"""What becomes of a `vllm serve` command line: flags that mean the same thing are spelt as ours, those that
ask for what is always so here are left out with a word, those that ask for what can't be had are refused.

Flags that coserve has under vLLM's name (serve_flags.py) pass as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from coserve.errors import ConfigError

# Flags with as many values as follow them; ours are repeated instead.
_LISTS = {
    "--served-model-name": re.compile(r"[^-]"),
    "--lora-modules": re.compile(r"[^-].*=|\{"),
}
_HUMAN = frozenset({"--max-model-len", "--max-num-batched-tokens", "--max-num-seqs"})
_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_DTYPES = {"float": "float32"}

_ALWAYS = "it is always so here"
# Flag without a value -> why it may be left out.
_SWITCHES = {
    "--enable-lora": "adapters are always on",
    "--enable-chunked-prefill": _ALWAYS,
    "--async-scheduling": _ALWAYS,
    "--enable-prompt-tokens-details": _ALWAYS,
    "--enable-request-id-headers": _ALWAYS,
    "--enable-server-load-tracking": "/load always answers",
    "--trust-remote-code": "no code of a model's is ever run",
    "--enforce-eager": "there is no compilation to turn off",
    "--disable-log-requests": "a request's text is never logged",
    "--no-enable-log-requests": "a request's text is never logged",
    "--disable-log-stats": "figures are in /metrics, not in the log",
    "--disable-uvicorn-access-log": "the log has one line for each request and no other",
    "--disable-fastapi-docs": "there are none",
    "--disable-frontend-multiprocessing": "server and engine are always two processes",
    "--disable-custom-all-reduce": "there is one device",
    "--fully-sharded-loras": "there is one device",
    "--long-lora-scaling-factors": "vLLM has it no more",
}
# Flag with a value -> (the values that ask for nothing else than what is done here, None being any; why).
_VALUES: dict[str, tuple[tuple[str, ...] | None, str]] = {
    "--tensor-parallel-size": (("1",), "coserve serves from one device"),
    "-tp": (("1",), "coserve serves from one device"),
    "--pipeline-parallel-size": (("1",), "coserve serves from one device"),
    "-pp": (("1",), "coserve serves from one device"),
    "--data-parallel-size": (("1",), "coserve serves from one device"),
    "-dp": (("1",), "coserve serves from one device"),
    "--api-server-count": (("1",), "there is one API server"),
    "--distributed-executor-backend": (None, "coserve serves from one device"),
    "--quantization": (("none", "None"), "the base is served in fp32 or bf16"),
    "-q": (("none", "None"), "the base is served in fp32 or bf16"),
    "--kv-cache-dtype": (("auto",), "keys and values have the model's dtype"),
    "--load-format": (("auto", "safetensors"), "models are safetensors files"),
    "--model-impl": (("auto", "vllm"), "models are coserve's own"),
    "--runner": (("auto", "generate"), "coserve generates"),
    "--task": (("auto", "generate"), "coserve generates"),
    "--tokenizer-mode": (("auto", "hf", "fast"), "tokenizers are Hugging Face's fast ones"),
    "--prefix-caching-hash-algo": (("sha256",), "prefixes are hashed with sha256"),
    "--scheduling-policy": (None, "requests' priorities count, and come first within one"),
    "--lora-dtype": (("auto", "float32"), "adapters are kept in fp32 and computed beside the base"),
    "--lora-extra-vocab-size": (None, "vLLM has it no more"),
    "--chat-template-content-format": (("auto",), "it is read off the template"),
    "--structured-outputs-config": (None, "llguidance is what constrains outputs"),
    "--guided-decoding-backend": (("auto", "guidance"), "llguidance is what constrains outputs"),
    "--compilation-config": (None, "there is no compilation to set"),
    "-O": (None, "there is no compilation to set"),
    "--swap-space": (None, "requests that lose their blocks are computed again"),
    "--cpu-offload-gb": (("0",), "the base's weights stay on the device"),
    "--max-seq-len-to-capture": (None, "there is no compilation to set"),
    "--limit-mm-per-prompt": (None, "coserve reads text only"),
    "--root-path": (None, "no answer has the server's own address in it"),
}
_REFUSED = {
    "--uds": "give --host and --port",
    "--middleware": "coserve runs no code from outside; put a proxy in front",
    "--speculative-config": "coserve has no speculative decoding",
    "--lora-target-modules": "an adapter says itself which modules it is on",
    "--no-enable-lora": "adapters can't be turned off; with no key of the role tune nobody loads any",
    "--no-enable-chunked-prefill": "long prompts are always computed in parts",
    "--return-tokens-as-token-ids": "ask for it with the request, by the field of the same name",
    "--kv-transfer-config": "one server holds the whole cache",
}


def ours(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the command line as coserve takes it, a sentence for each flag that was left out).

    Raises ConfigError for a flag, or a value of one, that asks for what coserve doesn't do.
    """
    left, kept, said = list(arguments), [], []
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
        if flag in _REFUSED:
            raise ConfigError(f"{flag}: {_REFUSED[flag]}.", param=flag)
        if flag in _SWITCHES:
            said.append(f"{flag} isn't needed: {_SWITCHES[flag]}.")
        elif flag in _VALUES:
            said.append(_checked(flag, value if equals else _next(flag, left)))
        elif flag in _LISTS and not equals:
            kept += [flag, _next(flag, left)]
            # A directory is the model, which vLLM would take for one more value.
            while left and _LISTS[flag].match(left[0]) and not Path(left[0]).is_dir():
                kept += [flag, left.pop(0)]
        elif flag in _HUMAN:
            kept += [flag, _number(flag, value if equals else _next(flag, left))]
        elif flag == "--dtype":
            given = value if equals else _next(flag, left)
            kept += [flag, _DTYPES.get(given, given)]
        else:
            kept.append(flag + equals + value)
    return kept, said


def _next(flag: str, left: list[str]) -> str:
    if not left:
        raise ConfigError(f"{flag} needs a value.", param=flag)
    return left.pop(0)


def _checked(flag: str, value: str) -> str:
    accepted, reason = _VALUES[flag]
    if accepted is not None and value not in accepted:
        raise ConfigError(f"{flag} {value}: {reason}; leave it out.", param=flag)
    return f"{flag} isn't needed: {reason}."


def _number(flag: str, value: str) -> str:
    """vLLM's ways to write a count: 16k is 16000, 16K is 16384, auto and -1 are the model's own."""
    if flag == "--max-model-len" and value in ("auto", "-1"):
        return "0"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", value)
    return str(int(float(match[1]) * _FACTORS[match[2]])) if match else value
