"""What every bench program shares: the model shape, the machine's description, pairing, and the result file.

A result is one JSON object: `headline` {what, coserve, peer, unit, ratio, spread, load}, `rows`, `machine`,
`commit`, `versions`. Ratios are of runs that were interleaved, so a machine that drifts drifts for both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import made_tokenizer

# A program's own folder comes first on the path, and has a coserve.py: the package must be found before it.
HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [*(place for place in sys.path if place != HERE), HERE]

from coserve.config import ALLOCATOR, EngineConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CACHE = Path.home() / ".cache" / "coserve-bench"  # models and peers' environments, made once
THREADS = os.cpu_count() or 1

# Qwen2.5-0.5B's published shape; the weights are random.
M1: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# Llama-3.2-1B's published shape.
M2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
QUICK_VOCABULARY = {"vocab_size": 8192, "bos_token_id": 8190, "eos_token_id": 8191}
SHAPES = {"0.5b": ("m1", M1), "1b": ("m2", M2)}  # the folder's name and the configuration

# The engine's own settings, given to both sides; PEFT gains most by the room at the heap's top.
TUNED_ALLOCATOR = ALLOCATOR


def arguments(
    description: str, add: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
) -> argparse.Namespace:
    """The command line all benches have, and what `add` puts to it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="result file (default: under bench/results)")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see it work")
    add(parser)
    return parser.parse_args()


def without_peer(parser: argparse.ArgumentParser) -> None:
    """The flag of the benches whose peer has an environment of its own."""
    parser.add_argument("--without-peer", action="store_true", help="measure coserve alone; install nothing")


def with_tuned_allocator() -> None:
    """Start this program again under the tuned allocator, unless it already is."""
    if os.environ.get("GLIBC_TUNABLES") != TUNED_ALLOCATOR:
        environment = {**os.environ, "GLIBC_TUNABLES": TUNED_ALLOCATOR}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def model_directory(quick: bool, cache: Path | None = None, shape: str = "0.5b") -> Path:
    """A directory with the bench's model in bf16 and a made tokenizer, written once (a narrow, short one for
    `quick`)."""
    name, config = SHAPES[shape]
    folder = (cache or CACHE) / (f"{name}-quick" if quick else name)
    if quick:
        config = config | {"num_hidden_layers": 4} | QUICK_VOCABULARY
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        settings = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        special = {config["bos_token_id"]: "<|begin|>", config["eos_token_id"]: "<|end|>"}
        made_tokenizer.write(folder, config["vocab_size"], special)
    return folder


def vocabulary(quick: bool, shape: str = "0.5b") -> int:
    """Entries of the model's vocabulary."""
    return int((QUICK_VOCABULARY if quick else SHAPES[shape][1])["vocab_size"])


def engine_config(model: Path, **settings: Any) -> EngineConfig:
    """Bench settings: bf16, no prefix cache (prompts repeat between rounds), a pool that fits."""
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 3 << 30,
        "max_loras": 8,
        "max_lora_rank": 16,
    }
    return EngineConfig(model=str(model), **(defaults | settings))


def quantile(values: Sequence[float], q: float) -> float | None:
    """Of values in any order; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def paired(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Run both in turn, `rounds` times, the order swapped every round; each returns its own figure."""
    mine: list[float] = []
    theirs: list[float] = []
    for index in range(rounds):
        order = [(ours, mine), (peer, theirs)]
        for run, figures in order if index % 2 == 0 else reversed(order):
            figures.append(run())
    return mine, theirs


def headline(
    what: str, unit: str, ours: list[float], peer: list[float], load: dict[str, Any]
) -> dict[str, Any]:
    """Medians, the median ratio of the pairs and its spread; without a peer's figures those are None."""
    if not peer:
        alone = {"peer": None, "ratio": None, "spread": None}
        return {"what": what, "coserve": median(ours), "unit": unit, "load": load, **alone}
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "what": what,
        "coserve": median(ours),
        "peer": median(peer),
        "unit": unit,
        "ratio": median(ratios),
        "spread": [min(ratios), max(ratios)],
        "load": load,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "flags"))
    ]
    model, flags = (names + ["", ""])[:2]
    features = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags.split()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model or platform.processor(),
        "features": features,
        "cores": THREADS,
        "memory_bytes": memory,
    }


def commit() -> str:
    """The commit measured, with "+" when the tree has changes."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def write(
    name: str, out: Path | None, result: dict[str, Any], versions: dict[str, str] | None = None
) -> None:
    """Add machine, commit and versions (`versions` beside our own); write the file; print the headline."""
    packages = ("torch", "transformers", "peft")
    result |= {
        "machine": machine(),
        "commit": commit(),
        "versions": {package: importlib.metadata.version(package) for package in packages}
        | {"python": platform.python_version()}
        | (versions or {}),
    }
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["headline"]))
