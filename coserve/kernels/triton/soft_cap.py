"""Soft cap of logits in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.elementary import tanh
from coserve.kernels.triton.support import cdiv, require_dense
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    logits = torch.randn(64, 256000, device=device, dtype=torch.bfloat16)
    return lambda: soft_cap_(logits, 30.0)


SETTINGS = ({"BLOCK": block, "num_warps": 4, "num_stages": 1} for block in (512, 1024, 2048))
TUNED = Tuned("soft_cap", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def soft_cap_kernel(x, count, cap, BLOCK: tl.constexpr):
    """cap * tanh(x / cap) in place of `count` elements, BLOCK a program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    tl.store(x + place, (cap * tanh(value / cap)).to(x.dtype.element_ty), inside)


def soft_cap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap contiguous `x` in place and return it."""
    require_dense(x=x)
    if x.numel():
        settings = TUNED.on(x.device)
        soft_cap_kernel[(cdiv(x.numel(), settings["BLOCK"]),)](x, x.numel(), cap, **settings)
    return x


AOT_CASES = [
    AotCase(soft_cap_kernel, {"x": f"*{dtype}:16", "count": "i64", "cap": "fp32"}, {}, TUNED)
    for dtype in ("bf16", "fp32")
]
