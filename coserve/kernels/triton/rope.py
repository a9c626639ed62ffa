"""Rotary embedding in place: a token's heads, some at a time, a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_rows
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    x = torch.randn(256, 40, 128, device=device, dtype=torch.bfloat16)
    tables = torch.randn(2, 512, 64, device=device)
    positions = torch.arange(256, device=device)
    return lambda: apply_rope_(x, positions, tables[0], tables[1], False)


SETTINGS = ({"HEADS": h, "num_warps": w, "num_stages": 1} for h in (4, 8, 16) for w in (2, 4))
TUNED = Tuned("rope", {"HEADS": 8, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def rope_kernel(
    x, stride, positions, cos, sin, N, D, half, INVERSE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """HEADS heads of one token of x [T, N, D], tokens `stride` apart, turned in place by fp32 tables
    [P, half] at its int64 position."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    turns = column < half
    angle = tl.load(positions + token) * half + column
    c = tl.load(cos + angle, turns, 0.0)
    s = tl.load(sin + angle, turns, 0.0)
    if INVERSE:
        s = -s
    first = x + token * stride + head * D + column
    inside = turns & (head < N)
    x1 = tl.load(first, inside, 0.0).to(tl.float32)
    x2 = tl.load(first + half, inside, 0.0).to(tl.float32)
    tl.debug_barrier()  # small tiles are held by several threads each: all read before one writes
    tl.store(first, (x1 * c - x2 * s).to(x.dtype.element_ty), inside)
    tl.store(first + half, (x2 * c + x1 * s).to(x.dtype.element_ty), inside)


def apply_rope_(
    x_TND: torch.Tensor,
    positions_T: torch.Tensor,
    cos_PD2: torch.Tensor,
    sin_PD2: torch.Tensor,
    inverse: bool,
) -> torch.Tensor:
    """Rotate `x` [T, N, D] (token stride free) in place and return it."""
    require_rows(x=x_TND)
    check_tables(x_TND, positions_T, cos_PD2, sin_PD2)
    T, N, D = x_TND.shape
    if x_TND.numel():
        settings, half = TUNED.on(x_TND.device), cos_PD2.shape[1]
        sizes = N, D, half, inverse, next_power_of_2(half)
        rope_kernel[(T, cdiv(N, settings["HEADS"]))](
            x_TND, x_TND.stride(0), positions_T, cos_PD2, sin_PD2, *sizes, **settings
        )
    return x_TND


def check_tables(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Positions and tables fit `x` [T, N, D]; ValueError if not."""
    T, _, D = x.shape
    require_index(torch.int64, x.device, positions=positions)
    for table in (cos, sin):
        fits = table.dtype == torch.float32 and table.is_contiguous() and table.device == x.device
        require(fits, "rope tables must be contiguous fp32 beside x")
    require(2 * cos.shape[1] <= D, f"tables of {cos.shape[1]} frequencies don't fit a head dim of {D}")
    require(positions.shape == (T,), f"positions of shape {tuple(positions.shape)} for {T} tokens")


AOT_CASES = [
    AotCase(
        rope_kernel,
        {"x": f"*{dtype}:16", "positions": "*i64:16", "cos": "*fp32:16", "sin": "*fp32:16"}
        | {"stride": "i32:16", "N": "i32", "D": "i32:16", "half": "i32:16"},
        {"INVERSE": is_inverse, "HALF": 64},
        TUNED,
    )
    for dtype in ("bf16", "fp32")
    for is_inverse in (False, True)
]
