"""The training peer: PEFT with torch's fused AdamW, in a process of its own with the allocator it is given.

A process a setting: what one setting's memory peaked at is gone when the next begins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[1]  # to run in: bench/ has a coserve.py that is not the package
RANK, IGNORED = 16, -100
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setting:
    """How the peer trains. `masked` gives the first half of the tokens no loss; `layers` () stands for all;
    `tuned` is the allocator that our side has."""

    tokens: int
    autocast: bool = True
    checkpointed: bool = False
    masked: bool = False
    layers: tuple[int, ...] = ()
    tuned: bool = True

    def __str__(self) -> str:
        words = [f"{self.tokens} tokens", "bf16 autocast" if self.autocast else "no autocast"]
        words += ["checkpointed"] if self.checkpointed else []
        words += ["half of the tokens without loss"] if self.masked else []
        words += ["adapters in the upper half of the layers"] if self.layers else []
        return ", ".join([*words, "tuned allocator" if self.tuned else "default allocator"])


def samples(vocab: int, tokens: int, masked: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of the one sample, the same for both sides."""
    import torch

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, vocab - 10, (tokens,), generator=generator).tolist()
    return ids, [IGNORED] * (tokens // 2) + ids[tokens // 2 :] if masked else ids


def launch(
    function: str,
    model: Path,
    vocab: int,
    setting: Setting,
    *,
    prefix: tuple[str, ...] = (),
    variables: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """A process that runs `function` of this module, its output in a pipe; `prefix` goes before its command,
    `variables` into its environment."""
    dropped = ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"GLIBC_TUNABLES": common.TUNED_ALLOCATOR} if setting.tuned else {}
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import peft_peer; "
    program += f"peft_peer.{function}({str(model)!r}, {vocab}, {json.dumps(asdict(setting))!r})"
    command = [*prefix, sys.executable, "-c", program]
    return subprocess.Popen(
        command, env=environment | (variables or {}), stdout=subprocess.PIPE, cwd=ROOT, **options
    )


class PeftProcess:
    """The peer's process; calling it runs one optimizer step."""

    def __init__(self, model: Path, vocab: int, setting: Setting) -> None:
        self._process = launch("serve_steps", model, vocab, setting, stdin=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        """Tokens/s over one optimizer step, trained or not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            print("step", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer's process ended with code {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def adapted(base: Any, *, layers: tuple[int, ...] = (), checkpointed: bool = False) -> Any:
    """PEFT's model of `base`, to be trained: rank 16 on all linears of `layers` (() stands for all)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(MODULES),
        layers_to_transform=list(layers) or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def prepare(folder: str, vocab: int, setting: Setting) -> tuple[Any, Callable[[], None]]:
    """PEFT's model on every core that this process may use, and what runs one optimizer step on it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = adapted(base, layers=setting.layers, checkpointed=setting.checkpointed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    ids, labels = (torch.tensor([row]) for row in samples(vocab, setting.tokens, setting.masked))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return base, step


def serve_steps(folder: str, vocab: int, setting_json: str) -> None:
    """The process itself: a step and its figure for every line read."""
    setting = Setting(**json.loads(setting_json))
    _, step = prepare(folder, vocab, setting)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(setting.tokens / (time.perf_counter() - began), flush=True)


def train_on(folder: str, vocab: int, setting_json: str) -> None:
    """The process itself: step after step; a dot on the output for each decoder layer passed, forward or
    backward, so that a slow step's progress can be told, and a line's end after each step."""
    setting = Setting(**json.loads(setting_json))
    base, step = prepare(folder, vocab, setting)
    output = sys.stdout.fileno()

    def mark(*_: Any) -> None:
        os.write(output, b".")

    def passed(_module: Any, _inputs: Any, result: Any) -> None:
        mark()
        (result[0] if isinstance(result, tuple) else result).register_hook(mark)

    for layer in base.model.layers:
        layer.register_forward_hook(passed)
    while True:
        step()
        os.write(output, b"\n")
