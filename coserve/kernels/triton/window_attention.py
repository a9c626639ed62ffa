"""Attention of training windows on CUDA and its backward; formulas as in the CPU's file.

Forward and dq: a program takes a tile of rows (tokens x the heads of one KV head) over the keys they see, in
blocks anchored at stream index 0, in ascending order; the forward is the loop that paged attention runs
(attention_tile.py). dk and dv: a program takes a block of keys and goes through tiles of queries, anchored at
stream index 0, last to first, in each through the KV head's heads in order, adding to what the buffers
hold. So nothing is added by two programs, and windows cut at multiples of 64, run last to first, give the
bits of the whole. `first_key` must not fall from one query to the next, as packed samples make it, and a
query's gap must end where its own sample begins or be empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.attention_tile import (
    LOG2E,
    attend,
    common_gap,
    scores_of,
    seen,
    settings_for,
    tuned_by_dim,
)
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense, require_rows, require_same


def _stream(device: torch.device, dim: int) -> tuple[torch.Tensor, ...]:
    """A window of 256 queries at the end of a sample of 2048 tokens: q, k, v, first keys."""
    like = {"device": device, "dtype": torch.bfloat16}
    k, v = torch.randn(2, 2048, 8, dim, **like)
    return torch.randn(256, 32, dim, **like), k, v, torch.zeros(256, dtype=torch.int32, device=device)


def _example(device: torch.device, dim: int) -> Callable[[], Any]:
    case = _stream(device, dim)
    return lambda: window_attention(*case, 1792, dim**-0.5, 0.0, None)


def _backward_example(device: torch.device, dim: int) -> Callable[[], Any]:
    case, scale = _stream(device, dim), dim**-0.5
    o, lse = window_attention(*case, 1792, scale, 0.0, None)
    sums = torch.zeros(2, 2048, 8, dim, device=device)
    return lambda: window_attention_backward(o, case[0], o, lse, *case[1:], 1792, scale, *sums, 0.0, None)


TUNED = tuned_by_dim(
    "window_attention",
    {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    _example,
)
TUNED_DQ = tuned_by_dim(
    "window_attention_dq",
    {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    _backward_example,
)
TUNED_DKDV = tuned_by_dim(
    "window_attention_dkdv",
    {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    _backward_example,
)
VARYING = ["window_start", "W"]  # from window to window: compiled once, whatever their values
LEAST_TILES = 16  # of a window that a compiled form has room for; then the powers of two


@triton.jit
def _rows(tile, kv_head, W, window_start, first_key, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile: which rows exist, their token in the window, head, first and last key."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    row_M = tl.arange(0, BLOCK_M)
    token_M, head_M = tile * TOKENS + row_M // GROUP, kv_head * GROUP + row_M % GROUP
    live_M = (row_M < TOKENS * GROUP) & (token_M < W)
    first_M = tl.load(first_key + token_M, mask=live_M, other=2147483647)
    last_M = tl.where(live_M, window_start + token_M, -1)
    return live_M, token_M, head_M, first_M, last_M


@triton.jit
def _gaps(gaps, token_M, live_M, GAPS: tl.constexpr):
    """First key of each row's gap and the one after it; rows that don't exist are in no tile's way."""
    if GAPS:
        gap_M = tl.load(gaps + 2 * token_M, mask=live_M, other=0)
        return gap_M, tl.load(gaps + 2 * token_M + 1, mask=live_M, other=2147483647)
    else:
        return token_M, token_M


@triton.jit(do_not_specialize=VARYING)
def window_kernel(
    q, q_stride, k, k_stride, v, v_stride, first_key, gaps, window_start, W, N, scale, soft_cap, o, lse,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, CAPPED: tl.constexpr, GAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, Nkv)."""
    kv_head = tl.program_id(1)
    live_M, token_M, head_M, first_M, last_M = _rows(
        tl.program_id(0), kv_head, W, window_start, first_key, GROUP, BLOCK_M
    )
    gap_M, gap_end_M = _gaps(gaps, token_M, live_M, GAPS)
    d_D = tl.arange(0, D_PADDED)
    mask_MD = live_M[:, None] & (d_D < D)[None, :]
    q_M = token_M.to(tl.int64) * q_stride + head_M * D
    q_MD = tl.load(q + q_M[:, None] + d_D[None, :], mask=mask_MD, other=0.0)
    begin, end = tl.min(first_M, 0) // BLOCK_N * BLOCK_N, tl.max(last_M, 0) + 1
    top_M, total_M, o_MD = attend(
        q_MD, first_M, last_M, begin, end, k + kv_head * D, v + kv_head * D, k, 0, 0, k_stride, v_stride,
        scale, soft_cap, D, BLOCK_N, 0, CAPPED, gap_M, gap_end_M, GAPS,
    )  # fmt: skip
    total_M = tl.where(live_M, total_M, 1.0)
    o_M = token_M.to(tl.int64) * N + head_M
    out_MD = (o_MD / total_M[:, None]).to(o.dtype.element_ty)
    tl.store(o + o_M[:, None] * D + d_D[None, :], out_MD, mask=mask_MD)
    tl.store(lse + o_M, (top_M + tl.log2(total_M)) / LOG2E, mask=live_M)


@triton.jit(do_not_specialize=VARYING)
def window_dq_kernel(
    do, do_stride, q, q_stride, o, o_stride, lse, k, k_stride, v, v_stride, first_key, gaps, window_start, W,
    N, scale, soft_cap, dq, delta,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, CAPPED: tl.constexpr, GAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, Nkv): dq, and delta = do . o for the kernel of dk and dv."""
    kv_head = tl.program_id(1)
    live_M, token_M, head_M, first_M, last_M = _rows(
        tl.program_id(0), kv_head, W, window_start, first_key, GROUP, BLOCK_M
    )
    gap_M, gap_end_M = _gaps(gaps, token_M, live_M, GAPS)
    d_D = tl.arange(0, D_PADDED)
    mask_MD = live_M[:, None] & (d_D < D)[None, :]
    row_M, column_MD = token_M.to(tl.int64), head_M[:, None] * D + d_D[None, :]
    q_MD = tl.load(q + (row_M * q_stride)[:, None] + column_MD, mask=mask_MD, other=0.0)
    do_MD = tl.load(do + (row_M * do_stride)[:, None] + column_MD, mask=mask_MD, other=0.0)
    o_MD = tl.load(o + (row_M * o_stride)[:, None] + column_MD, mask=mask_MD, other=0.0)
    delta_M = tl.sum(do_MD.to(tl.float32) * o_MD.to(tl.float32), 1)
    tl.store(delta + row_M * N + head_M, delta_M, mask=live_M)
    lse_M = tl.load(lse + row_M * N + head_M, mask=live_M, other=0.0) * LOG2E
    dq_MD = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    begin, end = tl.min(first_M, 0) // BLOCK_N * BLOCK_N, tl.max(last_M, 0) + 1
    row_N = tl.arange(0, BLOCK_N)
    skip_from, skip = common_gap(gap_M, gap_end_M, BLOCK_N, GAPS)
    for step in range(begin, end - skip, BLOCK_N):
        start = step
        if GAPS:
            start += tl.where(step >= skip_from, skip, 0)
        key_N = start + row_N
        mask_ND = (key_N < end)[:, None] & (d_D < D)[None, :]
        k_block = k + tl.cast(start, tl.int64) * k_stride + kv_head * D
        v_block = v + tl.cast(start, tl.int64) * v_stride + kv_head * D
        k_ND = tl.load(k_block + (row_N * k_stride)[:, None] + d_D[None, :], mask=mask_ND, other=0.0)
        v_ND = tl.load(v_block + (row_N * v_stride)[:, None] + d_D[None, :], mask=mask_ND, other=0.0)
        products_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        scores_MN, slope_MN = scores_of(products_MN, scale, soft_cap, CAPPED)
        seen_MN = seen(
            key_N[None, :], first_M[:, None], last_M[:, None], gap_M[:, None], gap_end_M[:, None], GAPS
        )
        p_MN = tl.exp2(tl.where(seen_MN, scores_MN - lse_M[:, None], float("-inf")))
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision="ieee")
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * slope_MN
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    tl.store(dq + (row_M * N * D)[:, None] + column_MD, dq_MD.to(dq.dtype.element_ty), mask=mask_MD)


@triton.jit(do_not_specialize=VARYING)
def window_dkdv_kernel(
    do, do_stride, q, q_stride, lse, delta, k, k_stride, v, v_stride, first_key, gaps, window_start, W, N,
    scale, soft_cap, dk, dv,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, CAPPED: tl.constexpr, GAPS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, Nkv): adds to dk and dv. Tiles of BLOCK_M queries, at most TILES of them."""
    kv_head = tl.program_id(1)
    key = tl.program_id(0) * BLOCK_N
    end = window_start + W
    # The tiles that see the block: from the diagonal, or the window's start, to the last that begins before
    # its sample's keys have moved past the block. If a tile's first query has the whole block in its gap, so
    # have the others: their samples begin no earlier.
    lowest = tl.maximum(key, window_start) // BLOCK_M
    tile_T = lowest + tl.arange(0, TILES)
    head_of_T = tl.maximum(tile_T * BLOCK_M - window_start, 0)
    first_T = tl.load(first_key + head_of_T, mask=head_of_T < W, other=2147483647)
    sees_T = first_T < key + BLOCK_N
    if GAPS:
        gap_T, gap_end_T = _gaps(gaps, head_of_T, head_of_T < W, GAPS)
        sees_T = sees_T & ((gap_T > key) | (gap_end_T < key + BLOCK_N))
    tiles = tl.sum(sees_T.to(tl.int32), 0)
    if tiles == 0:
        return

    key_N, d_D = key + tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    mask_ND = (key_N < end)[:, None] & (d_D < D)[None, :]
    row_N = key_N.to(tl.int64)
    key_ND = kv_head * D + d_D[None, :]
    k_ND = tl.load(k + (row_N * k_stride)[:, None] + key_ND, mask=mask_ND, other=0.0)
    v_ND = tl.load(v + (row_N * v_stride)[:, None] + key_ND, mask=mask_ND, other=0.0)
    sum_ND = (row_N * (N // GROUP) * D)[:, None] + key_ND
    dk_ND = tl.load(dk + sum_ND, mask=mask_ND, other=0.0)
    dv_ND = tl.load(dv + sum_ND, mask=mask_ND, other=0.0)
    row_M = tl.arange(0, BLOCK_M)
    for step in range(0, tiles * GROUP):
        head = kv_head * GROUP + step % GROUP
        tile = (lowest + tiles - 1 - step // GROUP) * BLOCK_M
        position_M = tile + row_M
        live_M = (position_M >= window_start) & (position_M < end)
        mask_MD = live_M[:, None] & (d_D < D)[None, :]
        token = (tile - window_start).to(tl.int64)
        q_tile = q + token * q_stride + head * D
        q_MD = tl.load(q_tile + (row_M * q_stride)[:, None] + d_D[None, :], mask=mask_MD, other=0.0)
        first_M = tl.load(first_key + token + row_M, mask=live_M, other=2147483647)
        lse_M = tl.load(lse + token * N + head + row_M * N, mask=live_M, other=0.0) * LOG2E
        products_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
        scores_NM, slope_NM = scores_of(products_NM, scale, soft_cap, CAPPED)
        gap_M, gap_end_M = _gaps(gaps, token + row_M, live_M, GAPS)
        seen_NM = seen(
            key_N[:, None], first_M[None, :], position_M[None, :], gap_M[None, :], gap_end_M[None, :], GAPS
        )
        p_NM = tl.exp2(tl.where(seen_NM, scores_NM - lse_M[None, :], float("-inf")))
        do_tile = do + token * do_stride + head * D
        do_MD = tl.load(do_tile + (row_M * do_stride)[:, None] + d_D[None, :], mask=mask_MD, other=0.0)
        delta_M = tl.load(delta + token * N + head + row_M * N, mask=live_M, other=0.0)
        dv_ND = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv_ND, input_precision="ieee")
        dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision="ieee")
        ds_NM = p_NM * (dp_NM - delta_M[None, :]) * slope_NM
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
    tl.store(dk + sum_ND, dk_ND, mask=mask_ND)
    tl.store(dv + sum_ND, dv_ND, mask=mask_ND)


def window_attention(
    q_WND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    first_key_W: torch.Tensor,
    window_start: int,
    scale: float,
    soft_cap: float,
    gaps_W2: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(o [W, N, D] in q's dtype, lse [W, N] fp32)`."""
    _check(q_WND, k_TND, v_TND, first_key_W, window_start, gaps_W2)
    (W, N, D), Nkv = q_WND.shape, k_TND.shape[1]
    gaps = first_key_W if gaps_W2 is None else gaps_W2  # where there is none nobody reads it
    o_WND = torch.empty((W, N, D), dtype=q_WND.dtype, device=q_WND.device)
    lse_WN = torch.empty((W, N), dtype=torch.float32, device=q_WND.device)
    if W:
        settings = settings_for(TUNED, q_WND, N // Nkv)
        window_kernel[(_tiles(W, settings), Nkv)](
            q_WND, q_WND.stride(0), k_TND, k_TND.stride(0), v_TND, v_TND.stride(0), first_key_W,
            gaps, window_start, W, N, scale, soft_cap, o_WND, lse_WN,
            CAPPED=soft_cap > 0, GAPS=gaps_W2 is not None, **settings,
        )  # fmt: skip
    return o_WND, lse_WN


def window_attention_backward(
    do_WND: torch.Tensor,
    q_WND: torch.Tensor,
    o_WND: torch.Tensor,
    lse_WN: torch.Tensor,
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    first_key_W: torch.Tensor,
    window_start: int,
    scale: float,
    dk_TND: torch.Tensor,
    dv_TND: torch.Tensor,
    soft_cap: float,
    gaps_W2: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient w.r.t. the window's `q`, in its dtype; adds those of all keys it sees into fp32 `dk`, `dv`."""
    _check(q_WND, k_TND, v_TND, first_key_W, window_start, gaps_W2)
    (W, N, D), Nkv = q_WND.shape, k_TND.shape[1]
    require_same(q_WND, do=do_WND, o=o_WND)
    require_rows(do=do_WND, o=o_WND)
    require(do_WND.shape == q_WND.shape and o_WND.shape == q_WND.shape, "do, o and q differ in shape")
    require(lse_WN.shape == (W, N), f"lse must be [{W}, {N}]")
    require_dense(lse=lse_WN, dk=dk_TND, dv=dv_TND)
    for name, sums in (("lse", lse_WN), ("dk", dk_TND), ("dv", dv_TND)):
        require(sums.dtype == torch.float32 and sums.device == q_WND.device, f"{name} must be fp32 beside q")
    require(dk_TND.shape == k_TND.shape and dv_TND.shape == k_TND.shape, "dk, dv and k differ in shape")
    dq_WND = torch.empty((W, N, D), dtype=q_WND.dtype, device=q_WND.device)
    if W == 0:
        return dq_WND
    gaps = first_key_W if gaps_W2 is None else gaps_W2  # where there is none nobody reads it
    delta_WN = torch.empty_like(lse_WN)
    settings = settings_for(TUNED_DQ, q_WND, N // Nkv)
    window_dq_kernel[(_tiles(W, settings), Nkv)](
        do_WND, do_WND.stride(0), q_WND, q_WND.stride(0), o_WND, o_WND.stride(0), lse_WN, k_TND,
        k_TND.stride(0), v_TND, v_TND.stride(0), first_key_W, gaps, window_start, W, N, scale, soft_cap,
        dq_WND, delta_WN, CAPPED=soft_cap > 0, GAPS=gaps_W2 is not None, **settings,
    )  # fmt: skip
    settings = settings_for(TUNED_DKDV, q_WND, 1) | {"GROUP": N // Nkv}
    end, tile = window_start + W, settings["BLOCK_M"]
    tiles = max(LEAST_TILES, next_power_of_2(cdiv(end, tile) - window_start // tile))
    window_dkdv_kernel[(cdiv(end, settings["BLOCK_N"]), Nkv)](
        do_WND, do_WND.stride(0), q_WND, q_WND.stride(0), lse_WN, delta_WN, k_TND, k_TND.stride(0), v_TND,
        v_TND.stride(0), first_key_W, gaps, window_start, W, N, scale, soft_cap, dk_TND, dv_TND,
        CAPPED=soft_cap > 0, GAPS=gaps_W2 is not None, TILES=tiles, **settings,
    )  # fmt: skip
    return dq_WND


def _tiles(W: int, settings: dict[str, int]) -> int:
    return cdiv(W, settings["BLOCK_M"] // settings["GROUP"])


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key: torch.Tensor,
    window_start: int,
    gaps: torch.Tensor | None,
) -> None:
    require_same(q, k=k, v=v)
    require_rows(q=q, k=k, v=v)
    require_index(torch.int32, q.device, first_key=first_key)
    if gaps is not None:
        require_index(torch.int32, q.device, gaps=gaps)
        require(gaps.shape == (len(q), 2), f"gaps must be [{len(q)}, 2], not {list(gaps.shape)}")
    require(k.shape == v.shape and k.shape[2] == q.shape[2], "k, v and q differ in shape")
    require(
        q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads"
    )
    require(len(first_key) == len(q), f"{len(first_key)} sample starts for {len(q)} queries")
    require(window_start + len(q) <= len(k), f"the window ends at {window_start + len(q)}, k at {len(k)}")


def _cases() -> list[AotCase]:
    cases = []
    for dtype, D in [*(("bf16", D) for D in (64, 80, 128, 256)), ("fp16", 64), ("fp32", 128)]:
        kind = max(64, next_power_of_2(D)), dtype == "fp32"
        x, sums = f"*{dtype}:16", "*fp32:16"
        signature = dict.fromkeys(("do", "q", "o", "k", "v", "dq"), x)
        signature |= dict.fromkeys(("do_stride", "q_stride", "o_stride", "k_stride", "v_stride"), "i32:16")
        signature |= {
            "first_key": "*i32:16",
            "gaps": "*i32:16",
            "window_start": "i32",
            "W": "i32",
            "N": "i32",
            "scale": "fp32",
        }
        signature |= {"soft_cap": "fp32"} | dict.fromkeys(("lse", "delta", "dk", "dv"), sums)
        shape = {
            "GROUP": 7 if D == 64 else 4,
            "D": D,
            "D_PADDED": next_power_of_2(D),
            "CAPPED": D == 256,
            "GAPS": D != 80,
        }
        for kernel, tuned, more in (
            (window_kernel, TUNED, {}),
            (window_dq_kernel, TUNED_DQ, {}),
            (window_dkdv_kernel, TUNED_DKDV, {"TILES": LEAST_TILES}),
        ):
            kept = {name: signature[name] for name in kernel.arg_names if name in signature}
            cases.append(AotCase(kernel, kept, shape | more, tuned[kind], hot=dtype != "fp32"))
    return cases


AOT_CASES = _cases()
