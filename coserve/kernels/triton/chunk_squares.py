"""Sums of squares by chunks (formula in coserve/kernels/chunk_squares.py), one program a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.chunk_squares import CHUNK
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    x = torch.randn(1 << 23, device=device)
    return lambda: chunk_squares(x)


# BLOCK is the same for all: its lanes are the order of summation.
SETTINGS = ({"BLOCK": 1024, "num_warps": w, "num_stages": s} for w in (2, 4, 8) for s in (1, 3))
TUNED = Tuned("chunk_squares", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def chunk_squares_kernel(x, out, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """out[chunk] float64 = sum of squares of fp32 x[chunk * CHUNK :], of `count` elements in all."""
    chunk = tl.program_id(0).to(tl.int64) * CHUNK
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        at = chunk + start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float64)
        sums += value * value
    tl.store(out + tl.program_id(0), tl.sum(sums, 0))


def chunk_squares(x: torch.Tensor) -> torch.Tensor:
    """float64 [chunks] of flat fp32 `x`."""
    out = torch.empty(cdiv(x.numel(), CHUNK), dtype=torch.float64, device=x.device)
    chunk_squares_kernel[(len(out),)](x, out, x.numel(), CHUNK=CHUNK, **TUNED.on(x.device))
    return out


AOT_CASES = [
    AotCase(chunk_squares_kernel, {"x": "*fp32:16", "out": "*fp64", "count": "i32"}, {"CHUNK": CHUNK}, TUNED)
]
