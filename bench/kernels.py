"""Every kernel beside what torch offers for the same work, on the 0.5B shape's sizes.

Each row is the median time of interleaved runs, in microseconds; `ratio` is the peer's time over ours.
`of_roof` is the least time that the machine needs for the same arithmetic and bytes (the ledger counts
them, the roofs are measured on the spot), over our best run; more than 1 means that the data lay in a cache.
Linears stream: enough copies of the matrix take turns that none is still in the cache. The headline is the
bf16 linear at eight tokens, the matrix that decoding a small batch waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from statistics import median
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from kernels_attention import decoding, prefill, sampling, windows
from ledger import Ledger, installed
from roofs import measure_roofs

from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import QuantizedMoments, adamw_8bit_
from coserve.kernels.cross_entropy import logit_gradient_, token_scores
from coserve.kernels.dropout import Dropout, module_salt, row_keys
from coserve.kernels.linear import PackedLinear
from coserve.kernels.lora import (
    LoraGroup,
    LoraModule,
    LoraSegments,
    ModuleGradient,
    lora_backward,
    lora_forward_,
)
from coserve.kernels.rms_norm import rms_norm
from coserve.kernels.rope import apply_rope_
from coserve.kernels.swiglu import swiglu

HIDDEN, INNER, HEADS, DIM, VOCAB, RANK = 896, 4864, 14, 64, 151936, 16
STREAMED = 128 << 20  # bytes of matrices in turn, more than a cache holds

Case = tuple[str, dict[str, Any], Callable[[], Any], Callable[[], Any]]


def timed(run: Callable[[], Any]) -> float:
    """Microseconds of one run."""
    began = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - began)


def in_turn(call: Callable[[Any, Any], Any], argument: Any, objects: list[Any]) -> Callable[[], Any]:
    """A run that takes the next of `objects` each time."""
    turns = cycle(objects)
    return lambda: call(next(turns), argument)


def linears() -> Iterator[Case]:
    """The MLP's first matrix, packed, beside F.linear."""
    for dtype in (torch.float32, torch.bfloat16):
        copies = max(2, STREAMED // (INNER * HIDDEN * dtype.itemsize))
        weights = [torch.randn(INNER, HIDDEN).to(dtype) for _ in range(copies)]
        packed = [PackedLinear(weight) for weight in weights]
        for tokens in (1, 8, 16, 64, 256):
            x, dy = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, INNER).to(dtype)
            load = {"dtype": str(dtype)[6:], "tokens": tokens, "out": INNER, "in": HIDDEN}
            yield (
                "linear",
                load,
                in_turn(lambda p, x: p.forward(x), x, packed),
                in_turn(lambda w, x: F.linear(x, w), x, weights),
            )
            yield (
                "linear_backward",
                load,
                in_turn(lambda p, dy: p.backward_input(dy), dy, packed),
                in_turn(lambda w, dy: dy @ w, dy, weights),
            )
            if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
                theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, 64) for weight in weights]
                multiply = torch.ops.mkldnn._linear_pointwise
                yield (
                    "linear",
                    {**load, "peer": "oneDNN prepacked"},
                    in_turn(lambda p, x: p.forward(x), x, packed),
                    in_turn(lambda w, x, f=multiply: f(x, w, None, "none", [], ""), x, theirs),
                )


def invariance() -> Iterator[Case]:
    """What the same bits in every batch cost: beside oneDNN's prepacked product, which promises none."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for out, into in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        weight = torch.randn(out, into).bfloat16()
        packed, theirs = PackedLinear(weight), torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        for tokens in (1, 8, 32, 128, 512):
            x = torch.randn(tokens, into).bfloat16()
            load = {"dtype": "bfloat16", "tokens": tokens, "out": out, "in": into}
            yield (
                "linear_invariance",
                load,
                lambda x=x, p=packed: p.forward(x),
                lambda x=x, w=theirs: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
            )


def elementwise() -> Iterator[Case]:
    """Norm, rotary embedding and gating."""
    weight = torch.ones(HIDDEN)
    angles = torch.rand(4096, DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    for tokens in (1, 512):
        x, gate_up = torch.randn(tokens, HIDDEN), torch.randn(tokens, 2 * INNER)
        q, positions = torch.randn(tokens, HEADS, DIM), torch.arange(tokens)
        load = {"dtype": "float32", "tokens": tokens}
        yield (
            "rms_norm",
            load,
            lambda x=x: rms_norm(x, weight, 1e-6),
            lambda x=x: F.rms_norm(x, (HIDDEN,), weight, 1e-6),
        )
        yield (
            "swiglu",
            load,
            lambda g=gate_up: swiglu(g),
            lambda g=gate_up: F.silu(g[:, :INNER]) * g[:, INNER:],
        )

        def rotate(q: torch.Tensor = q, positions: torch.Tensor = positions) -> torch.Tensor:
            c, s = cos[positions][:, None], sin[positions][:, None]
            first, second = q.chunk(2, -1)
            return torch.cat([first * c - second * s, second * c + first * s], -1)

        yield "rope", load, lambda q=q, p=positions: apply_rope_(q, p, cos, sin), rotate


def adapters() -> Iterator[Case]:
    """A rank-16 adapter on one matrix, forward and backward, also with dropout; the peer is two matrix
    products (and torch's dropout, whose mask it keeps)."""
    a, b = torch.randn(64, HIDDEN), torch.randn(64, HIDDEN)
    rows, group = torch.arange(RANK, dtype=torch.int32), LoraGroup([LoraModule(a, b, salt=module_salt(0, 0))])
    for tokens in (8, 512):
        x, y = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN)
        bounds = [torch.tensor([v], dtype=torch.int32) for v in (0, tokens, 0)]
        segments, ranks = LoraSegments(*bounds, rows), torch.tensor([[RANK]], dtype=torch.int32)
        load = {"dtype": "float32", "tokens": tokens, "rank": RANK}
        yield (
            "lora_forward",
            load,
            lambda x=x, y=y, s=segments, r=ranks: lora_forward_(y, x, group, s, r),
            lambda x=x, y=y: y.addmm_(x @ a[:RANK].T, b[:RANK]),
        )
        dx, da, db = torch.zeros(tokens, HIDDEN), torch.zeros(RANK, HIDDEN), torch.zeros(RANK, HIDDEN)

        def peer(x=x, y=y, dx=dx, da=da, db=db) -> None:
            h, dh = x @ a[:RANK].T, y @ b[:RANK].T
            db.addmm_(h.T, y), da.addmm_(dh.T, x), dx.addmm_(dh, a[:RANK])

        yield (
            "lora_backward",
            load,
            lambda x=x, y=y, dx=dx, da=da, db=db: lora_backward(
                y, x, [ModuleGradient(a, b, rows, da, db)], dx, 0
            ),
            peer,
        )
        keys = torch.from_numpy(row_keys(1, 2, 3, np.arange(tokens)))
        drop = Dropout(keys, torch.tensor([0.1], dtype=torch.float64), module_salt(0, 0))

        def ours(x=x, y=y, dx=dx, da=da, db=db, s=segments, r=ranks, d=drop) -> None:
            lora_forward_(y, x, group, s, r, d)
            lora_backward(y, x, [ModuleGradient(a, b, rows, da, db, d)], dx, 0)

        def peer_dropped(x=x, y=y, dx=dx, da=da, db=db) -> None:
            keep = torch.empty_like(x).bernoulli_(0.9).div_(0.9)
            dropped = x * keep
            h, dh = dropped @ a[:RANK].T, y @ b[:RANK].T
            y.addmm_(h, b[:RANK]), db.addmm_(h.T, y), da.addmm_(dh.T, dropped)
            dx.add_((dh @ a[:RANK]) * keep)

        yield "lora_dropout", {**load, "rate": 0.1}, ours, peer_dropped


def loss_and_optimizer() -> Iterator[Case]:
    """Cross-entropy with its gradient over the whole vocabulary, and AdamW over a rank-16 adapter."""
    logits, targets = torch.randn(64, VOCAB), torch.randint(0, VOCAB, (64,))
    weight, uniform = torch.ones(64), torch.zeros(64)

    def ours() -> torch.Tensor:
        scores = token_scores(logits, targets)
        logit_gradient_(logits, targets, scores.lse_C, weight, uniform)
        return scores.logprob_C

    def peer_loss() -> torch.Tensor:
        gradient = F.softmax(logits, -1)
        gradient[torch.arange(64), targets] -= 1.0
        return F.cross_entropy(logits, targets, reduction="none")

    load = {"dtype": "float32", "rows": 64, "vocabulary": VOCAB}
    yield "cross_entropy", load, ours, peer_loss
    size = 8_800_000
    state = torch.rand(4, size)
    parameter = torch.rand(size).requires_grad_()
    parameter.grad = torch.rand(size)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 3}
    yield (
        "adamw",
        {"dtype": "float32", "parameters": size},
        lambda: adamw_(*state, **settings),
        lambda: optimizer.step(),
    )
    moments = QuantizedMoments.zeros([(0, size, 1.0)])
    yield (
        "adamw_8bit",
        {"dtype": "float32", "parameters": size, "peer": "torch's fused AdamW, moments fp32"},
        lambda: adamw_8bit_(state[0], state[1], moments, **settings),
        lambda: optimizer.step(),
    )


def work(run: Callable[[], Any]) -> tuple[float, float]:
    """Arithmetic and bytes of one run, as the ledger counts them."""
    with installed(Ledger()) as ledger:
        run()
    entries = ledger.entries.values()
    return sum(entry.flop for entry in entries), sum(entry.moved for entry in entries)


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    rounds = 5 if options.quick else 41
    rows: list[dict[str, Any]] = []
    headline: dict[str, Any] = {}
    parts = (linears, invariance, elementwise, adapters, decoding, prefill, windows, sampling)
    parts += (loss_and_optimizer,)
    with torch.no_grad():
        roofs = {name: measure_roofs(getattr(torch, name)) for name in ("float32", "bfloat16")}
        for part in parts:
            for name, load, ours, peer in part():
                ours(), peer()
                least = 1e6 * roofs[load["dtype"]].seconds(*work(ours))
                mine, theirs = common.paired(lambda run=ours: timed(run), lambda run=peer: timed(run), rounds)
                rows.append(
                    {"kernel": name, **load, "coserve_us": median(mine), "torch_us": median(theirs)}
                    | {"ratio": median(b / a for a, b in zip(mine, theirs, strict=True))}
                    | {"coserve_best_us": min(mine), "of_roof": least / min(mine)}
                )
                if name == "linear" and (load["dtype"], load["tokens"], "peer" in load) == (
                    "bfloat16",
                    8,
                    False,
                ):
                    speeds = [[1e6 / t for t in times] for times in (mine, theirs)]
                    what = "bf16 linear of 8 tokens, F.linear as the peer"
                    headline = common.headline(what, "calls/s", *speeds, load)
    measured = {name: asdict(roof) for name, roof in roofs.items()}
    common.write("kernels", options.out, {"headline": headline, "roofs": measured, "rows": rows})
    for row in rows:
        about = ", ".join(
            f"{k} {v}"
            for k, v in row.items()
            if k in ("dtype", "tokens", "sequences", "context", "rows", "settings", "peer")
        )
        print(
            f"{row['kernel']:26} {row['ratio']:6.2f}x {row['coserve_us']:10.1f} us "
            f"{row['of_roof']:6.1%} of roof  {about}"
        )


if __name__ == "__main__":
    main()
