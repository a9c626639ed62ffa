"""One adapter's gradients over one window (formula in coserve/kernels/lora.py), in two launches.

    hidden      h = x a^T and dh = dy b^T, in parts as the forward's shrink: x and dy are read once
    gradients   da += dh^T x, db += h^T dy by blocks of columns, dx += dh a by tiles of tokens: read once more

After LoRAFusion (Zhu et al. 2025), but h is made again instead of kept, and nothing is added by atomics: a
program owns its columns of da or db and takes the tiles of 64 tokens, anchored at the microbatch's start,
last to first. Windows cut at multiples of 64 give the same bits. Dropout's mask is hashed again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import TILE
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.dropout import kept, threshold_of
from coserve.kernels.triton.lora_shrink import (
    DROPOUT_TYPES,
    MANY_PROGRAMS,
    PART,
    check_dropout,
    dropout_arguments,
    expand,
    product,
    project_part,
    whole,
)
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense, require_rows, require_same
from coserve.kernels.triton.tuning import Tuned

MAX_BLOCK_R = 64


def _example(device: torch.device) -> Any:
    dy, x, a, b, dx = (torch.randn(256, 4096, device=device, dtype=torch.bfloat16) for _ in range(5))
    da, db = (torch.zeros(16, 4096, device=device) for _ in range(2))
    rows = torch.arange(16, device=device, dtype=torch.int32)
    return lambda: lora_backward(dy, x, a, b, rows, dx, da, db, 0)


HIDDEN = Tuned(
    "lora_backward_hidden",
    {"TOKENS": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    tuple(
        {"TOKENS": 32, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for k in (64, 128)
        for warps in (2, 4)
        for stages in (3, 4)
    ),
    _example,
)
GRADIENTS = Tuned(
    "lora_backward_gradients",
    {"BLOCK_C": 64, "num_warps": 8, "num_stages": 2},
    tuple(
        {"BLOCK_C": c, "num_warps": warps, "num_stages": stages}
        for c in (64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
    ),
    _example,
)


@triton.jit(do_not_specialize=["salt", "T", "x_parts", "part_stride"])
def hidden_kernel(
    x, x_stride, dy, dy_stride, a, b, rows, h, dh, x_parts, part_stride, keys, rates, salt, T, K, N, R,
    DROPS: tl.constexpr, APART: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tokens' part of h = x a^T, or for the programs behind of dh = dy b^T; fp32 [parts, T, R]."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = t < T
    part = tl.program_id(1)
    threshold = 0
    if DROPS:
        threshold = threshold_of(tl.load(rates))
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_live = r < R
        row = tl.load(rows + r, mask=r_live, other=0)
        at = t.to(tl.int64)[:, None] * R + r[None, :]
        inside = live[:, None] & r_live[None, :]
        if part < x_parts:
            project_part(
                x, x_stride, t, live, a, row, r_live, keys, salt, threshold, part, K, h + at, part_stride,
                inside, APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
            )  # fmt: skip
        else:
            project_part(
                dy, dy_stride, t, live, b, row, r_live, keys, salt, threshold, part - x_parts, N, dh + at,
                part_stride, inside, APART, PART, TOKENS, BLOCK_K, BLOCK_R, False,
            )  # fmt: skip


@triton.jit
def _token_sums(
    out, left, left_parts, part_stride, factor, right, right_stride, keys, salt, threshold, column, r0,
    token_offset, T, R, C,
    DROPS: tl.constexpr, SCALES: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[r, c] += sum over tokens of left[t, r] * right[t, c], tile after tile, last to first."""
    r, c = r0 + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    r_live, c_live = r < R, c < C
    at = out + r.to(tl.int64)[:, None] * C + c[None, :]
    inside = r_live[:, None] & c_live[None, :]
    total = tl.load(at, mask=inside, other=0.0)
    first_tile = token_offset // TILE
    tiles = (token_offset + T + TILE - 1) // TILE - first_tile
    for back in range(0, tiles):
        t = (first_tile + tiles - 1 - back) * TILE - token_offset + tl.arange(0, TILE)
        live = (t >= 0) & (t < T)
        ls = whole(left, t, live, r, r_live, left_parts, part_stride, R)
        if SCALES:
            ls = ls * factor
        rs = tl.load(
            right + t.to(tl.int64)[:, None] * right_stride + c[None, :],
            mask=live[:, None] & c_live[None, :],
            other=0.0,
        )
        if DROPS:
            rs = tl.where(kept(tl.load(keys + t, mask=live, other=0), salt, c, threshold), rs, 0.0)
        total += product(tl.trans(ls), rs, tl.zeros((BLOCK_R, BLOCK_C), tl.float32))
    tl.store(at, total, mask=inside)


@triton.jit
def _input_gradient(
    dx, dx_stride, dh, parts, part_stride, factor, a, rows, keys, salt, threshold, tile, column, T, R, K,
    DROPS: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx += dh a for one tile of tokens and one block of columns, under the mask."""
    t, c = tile * TILE + tl.arange(0, TILE), column + tl.arange(0, BLOCK_C)
    live, c_live = t < T, c < K
    acc = expand(
        dh, parts, part_stride, factor, a, rows, t, live, c, c_live, R, R, K, DROPS, TILE, BLOCK_R, BLOCK_C
    )
    if DROPS:
        acc = tl.where(kept(tl.load(keys + t, mask=live, other=0), salt, c, threshold), acc, 0.0)
    at = dx + t.to(tl.int64)[:, None] * dx_stride + c[None, :]
    inside = live[:, None] & c_live[None, :]
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, (before.to(tl.float32) + acc).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=["salt", "T", "token_offset", "x_parts", "dy_parts", "part_stride", "k_jobs"])
def gradients_kernel(
    x, x_stride, dy, dy_stride, dx, dx_stride, a, rows, h, dh, x_parts, dy_parts, part_stride, da, db,
    keys, rates, salt, token_offset, T, K, N, R, k_jobs,
    DROPS: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Programs [0, k_jobs) make da, the next ones db, the rest dx."""
    job = tl.program_id(0)
    n_jobs = tl.cdiv(N, BLOCK_C) * tl.cdiv(R, BLOCK_R)
    threshold, factor = 0, 1.0
    if DROPS:
        rate = tl.load(rates)
        threshold, factor = threshold_of(rate), (1.0 / (1.0 - rate)).to(tl.float32)
    if job < k_jobs:
        blocks = tl.cdiv(K, BLOCK_C)
        _token_sums(
            da, dh, dy_parts, part_stride, factor, x, x_stride, keys, salt, threshold,
            job % blocks * BLOCK_C, job // blocks * BLOCK_R, token_offset, T, R, K,
            DROPS, DROPS, TILE, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif job < k_jobs + n_jobs:
        job -= k_jobs
        blocks = tl.cdiv(N, BLOCK_C)
        _token_sums(
            db, h, x_parts, part_stride, factor, dy, dy_stride, keys, salt, threshold,
            job % blocks * BLOCK_C, job // blocks * BLOCK_R, token_offset, T, R, N,
            False, DROPS, TILE, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        job -= k_jobs + n_jobs
        blocks = tl.cdiv(K, BLOCK_C)
        _input_gradient(
            dx, dx_stride, dh, dy_parts, part_stride, factor, a, rows, keys, salt, threshold,
            job // blocks, job % blocks * BLOCK_C, T, R, K, DROPS, TILE, BLOCK_R, BLOCK_C,
        )  # fmt: skip


def lora_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    a_RK: torch.Tensor,
    b_RN: torch.Tensor,
    rows: torch.Tensor,
    dx_TK: torch.Tensor,
    da_rK: torch.Tensor | None,
    db_rN: torch.Tensor,
    token_offset: int,
    dropout: Dropout | None = None,
) -> None:
    """Add one adapter's gradients over one window into `dx` [T, K] and fp32 `da` [r, K], `db` [r, N]."""
    (T, N), K, R = dy_TN.shape, x_TK.shape[1], len(rows)
    _check(dy_TN, x_TK, a_RK, b_RN, rows, dx_TK, da_rK, db_rN, dropout)
    if T == 0 or R == 0:
        return
    settings, sums = HIDDEN.on(dy_TN.device), GRADIENTS.on(dy_TN.device)
    x_parts, dy_parts = cdiv(K, PART), cdiv(N, PART)
    token_tiles, block_r, block_c = cdiv(T, settings["TOKENS"]), _block_r(R), sums["BLOCK_C"]
    apart = 2 * token_tiles < MANY_PROGRAMS
    if not apart:
        x_parts = dy_parts = 1
    hidden = torch.empty((x_parts + dy_parts, T, R), dtype=torch.float32, device=x_TK.device)
    h, dh = hidden[:x_parts], hidden[x_parts:]
    how = dropout_arguments(dropout)
    hidden_kernel[(token_tiles, len(hidden))](
        x_TK, x_TK.stride(0), dy_TN, dy_TN.stride(0), a_RK, b_RN, rows, h, dh, x_parts, hidden.stride(0),
        *how, T, K, N, R,
        DROPS=dropout is not None, APART=apart, PART=PART, BLOCK_R=min(block_r, 32), **settings,
    )  # fmt: skip
    k_blocks, rank_blocks = cdiv(K, block_c), cdiv(R, block_r)
    k_jobs = 0 if da_rK is None else k_blocks * rank_blocks
    jobs = k_jobs + cdiv(N, block_c) * rank_blocks + cdiv(T, TILE) * k_blocks
    gradients_kernel[(jobs,)](
        x_TK, x_TK.stride(0), dy_TN, dy_TN.stride(0), dx_TK, dx_TK.stride(0), a_RK, rows, h, dh,
        x_parts, dy_parts, hidden.stride(0),
        db_rN if da_rK is None else da_rK, db_rN, *how, token_offset, T, K, N, R, k_jobs,
        DROPS=dropout is not None, TILE=TILE, BLOCK_R=block_r, **sums,
    )  # fmt: skip


def _block_r(rank: int) -> int:
    return min(max(16, next_power_of_2(rank)), MAX_BLOCK_R)


def _check(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    dx: torch.Tensor,
    da: torch.Tensor | None,
    db: torch.Tensor,
    dropout: Dropout | None,
) -> None:
    (T, N), K, rank = dy.shape, x.shape[1], len(rows)
    require_same(dy, x=x, a=a, b=b, dx=dx)
    require_rows(dy=dy, x=x, dx=dx)
    require_dense(a=a, b=b)
    require_index(torch.int32, dy.device, rows=rows)
    require(a.shape[1] == K and b.shape[1] == N, f"a and b are not [rows, {K}] and [rows, {N}]")
    require(x.shape == (T, K) and dx.shape == (T, K), f"x and dx are not [{T}, {K}]")
    for name, grad, shape in (("da", da, (rank, K)), ("db", db, (rank, N))):
        if grad is not None:
            require(grad.shape == shape, f"{name} is not {list(shape)}")
            require(grad.dtype == torch.float32 and grad.is_contiguous(), f"{name} must be contiguous fp32")
            require(grad.device == dy.device, f"{name} is on {grad.device}, expected {dy.device}")
    check_dropout(dy.device, dropout, T, 1)


def _cases() -> list[AotCase]:
    cases = []
    for dtype, rank, drops in (
        ("bf16", 16, False), ("bf16", 64, False), ("bf16", 64, True), ("fp16", 16, False),
        ("fp32", 16, False),
    ):  # fmt: skip
        x, sums = f"*{dtype}:16", "*fp32:16"
        sizes = dict.fromkeys(("K", "N", "R", "x_stride", "dy_stride", "dx_stride"), "i32:16")
        sizes |= dict.fromkeys(("x_parts", "dy_parts", "part_stride", "T", "token_offset", "k_jobs"), "i32")
        common = {"x": x, "dy": x, "a": x, "rows": "*i32:16", "h": sums, "dh": sums, "salt": "i32"}
        constants: dict[str, Any] = {"DROPS": drops, "BLOCK_R": _block_r(rank)}
        if drops:
            common |= DROPOUT_TYPES
        else:
            constants |= {"keys": None, "rates": None}
        hidden, gradients = {**common, "b": x}, {**common, "dx": x, "da": sums, "db": sums}
        hidden |= {name: kind for name, kind in sizes.items() if name in hidden_kernel.arg_names}
        first = constants | {"APART": True, "PART": PART, "BLOCK_R": min(_block_r(rank), 32)}
        cases.append(AotCase(hidden_kernel, hidden, first, HIDDEN, hot=dtype == "bf16"))
        second = constants | {"TILE": TILE}
        cases.append(AotCase(gradients_kernel, gradients | sizes, second, GRADIENTS, hot=dtype == "bf16"))
    return cases


AOT_CASES = _cases()
