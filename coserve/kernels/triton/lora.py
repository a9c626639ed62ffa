"""LoRA on a batch that mixes adapters (formula in coserve/kernels/lora.py): shrink, then expand.

    y[t] += (h[0, t] + h[1, t] + ...) b[rows]       with h of lora_shrink.py, which has the routing too

Both launches depend on the number of tokens and segments alone, whatever is in the tables.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraSegments
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.lora_backward import lora_backward
from coserve.kernels.triton.lora_shrink import (
    TABLE_TYPES,
    check_tables,
    expand,
    find_tile,
    hidden_width,
    lora_shrink,
    tables,
    tile_capacity,
)
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense, require_rows, require_same
from coserve.kernels.triton.tuning import Tuned

__all__ = ["lora_backward", "lora_expand_", "lora_forward_"]


def _example(device: torch.device) -> Any:
    y, b = (torch.randn(rows, 4096, device=device, dtype=torch.bfloat16) for rows in (64, 64))
    h = torch.randn(4, 64, 64, device=device)
    own = [torch.arange(4, device=device, dtype=torch.int32) * 16 + shift for shift in (0, 16, 0)]
    segments = LoraSegments(*own, torch.arange(64, device=device, dtype=torch.int32))
    ranks = torch.full((4,), 16, device=device, dtype=torch.int32)
    return lambda: lora_expand_(y, h, b, segments, ranks)


CANDIDATES = tuple(
    {"TOKENS": tokens, "BLOCK_R": r, "BLOCK_N": n, "num_warps": warps, "num_stages": 2}
    for tokens in (16, 32)
    for r in (16, 32)
    for n in (64, 128, 256)
    for warps in (2, 4)
)
DEFAULT = {"TOKENS": 32, "BLOCK_R": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
TUNED = Tuned("lora_expand", DEFAULT, CANDIDATES, _example)


@triton.jit(do_not_specialize=["count", "part_stride", "parts"])
def expand_kernel(
    y, y_stride, b, h, parts, part_stride, token_start, token_end, row_offset, rows, ranks, rank_stride,
    count, rates, N, R,
    SEGMENTS: tl.constexpr, DROPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of tokens and BLOCK_N columns of y [T, N] += h b, b [rows, N]; h fp32 [parts, T, R]."""
    segment, first, end, rank = find_tile(
        token_start, token_end, ranks, rank_stride, count, tl.program_id(0), SEGMENTS, TOKENS
    )
    if rank == 0:
        return
    t = first + tl.arange(0, TOKENS)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, n_live = t < end, n < N
    own_rows = rows + tl.load(row_offset + segment)
    factor = 1.0
    if DROPS:
        factor = (1.0 / (1.0 - tl.load(rates + segment))).to(tl.float32)
    acc = expand(
        h, parts, part_stride, factor, b, own_rows, t, live, n, n_live, rank, R, N,
        DROPS, TOKENS, BLOCK_R, BLOCK_N,
    )  # fmt: skip
    at = y + t.to(tl.int64)[:, None] * y_stride + n[None, :]
    inside = live[:, None] & n_live[None, :]
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, (before.to(tl.float32) + acc).to(before.dtype), mask=inside)


def lora_expand_(
    y_TN: torch.Tensor,
    h_PTR: torch.Tensor,
    b_RN: torch.Tensor,
    segments: LoraSegments,
    ranks_S: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Add h b to `y` [T, N] (row stride free) in place; `h` fp32 [parts, T, R] is a shrink's with these
    tables, b [rows, N] in y's dtype."""
    (T, N), S, settings = y_TN.shape, segments.count, TUNED.on(y_TN.device)
    require_same(y_TN, b=b_RN)
    require_rows(y=y_TN)
    require_dense(b=b_RN, h=h_PTR)
    require(b_RN.shape[1] == N, f"b has {b_RN.shape[1]} columns, y {N}")
    require(
        h_PTR.dtype == torch.float32 and h_PTR.shape[1:] == (T, hidden_width(segments)),
        f"h is {h_PTR.dtype} {tuple(h_PTR.shape)}, expected float32 (parts, {T}, {hidden_width(segments)})",
    )
    if T == 0 or len(segments.rows) == 0:
        return y_TN
    expand_kernel[(tile_capacity(T, S, settings["TOKENS"]), cdiv(N, settings["BLOCK_N"]))](
        y_TN, y_TN.stride(0), b_RN, h_PTR, len(h_PTR), h_PTR.stride(0), *tables(segments), ranks_S,
        ranks_S.stride(0), S, dropout and dropout.rates_S, N, h_PTR.shape[2],
        SEGMENTS=next_power_of_2(S), DROPS=dropout is not None, **settings,
    )  # fmt: skip
    return y_TN


def lora_forward_(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    a_RK: torch.Tensor,
    b_RN: torch.Tensor,
    segments: LoraSegments,
    ranks_S: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Add each segment's adapter to `y` [T, N] in place and return it; row strides of `y`, `x` are free."""
    N, K = y_TN.shape[1], x_TK.shape[1]
    require_same(y_TN, x=x_TK, a=a_RK, b=b_RN)
    require_rows(y=y_TN, x=x_TK)
    require_dense(a=a_RK, b=b_RN)
    require(len(x_TK) == len(y_TN), f"x has {len(x_TK)} rows, y {len(y_TN)}")
    require(a_RK.shape[1] == K and b_RN.shape[1] == N, f"a and b are not [rows, {K}] and [rows, {N}]")
    check_tables(y_TN.device, segments, ranks_S, dropout, len(x_TK))
    if len(y_TN) == 0 or len(segments.rows) == 0:
        return y_TN
    h_PTR = lora_shrink(x_TK, a_RK, segments, ranks_S, dropout)
    return lora_expand_(y_TN, h_PTR, b_RN, segments, ranks_S, dropout)


def _cases() -> list[AotCase]:
    cases = []
    for dtype, drops in (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False)):
        y = f"*{dtype}:16"
        signature = {"y": y, "y_stride": "i32:16", "b": y, "h": "*fp32:16", "parts": "i32", **TABLE_TYPES}
        signature |= {
            "part_stride": "i32",
            "rank_stride": "i32",
            "count": "i32",
            "N": "i32:16",
            "R": "i32:16",
        }
        constants: dict[str, Any] = {"SEGMENTS": 32, "DROPS": drops}
        if drops:
            signature["rates"] = "*fp64"
        else:
            constants["rates"] = None
        cases.append(AotCase(expand_kernel, signature, constants, TUNED, hot=dtype == "bf16"))
    return cases


AOT_CASES = _cases()
