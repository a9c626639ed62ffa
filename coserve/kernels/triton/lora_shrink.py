"""The first half of LoRA on a batch that mixes adapters, and what all LoRA kernels share.

    h[t] = x[t] a[rows]^T       over parts of `PART` inputs, kept apart in h [parts, T, R]

A program finds its tile of tokens in the segment tables itself. The grid has room for any segments over T
tokens, ceil(T / TOKENS) + S tiles, and a program beyond the work ends at once: the host reads nothing back,
so a step can be captured into a CUDA graph. Tables shorter than their capacity end in segments of no tokens.

Parts are summed from zero and added in ascending order: by whoever reads h where programs share the work of
a token, in the shrink's own loop where there are tokens enough. Both give the same bits, so a token's result
depends neither on its batch nor on the number of tokens. h is fp32; as a factor of a bf16 or fp16 product it
is split into two numbers of that type.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraSegments
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.dropout import kept, threshold_of
from coserve.kernels.triton.support import cdiv, next_power_of_2
from coserve.kernels.triton.tuning import Tuned

MAX_RANK = 256
PART = 1024
MANY_PROGRAMS = 128  # from here on tiles alone fill a device, and a program sums all parts itself


def _example(device: torch.device) -> Any:
    x, a = (torch.randn(rows, 4096, device=device, dtype=torch.bfloat16) for rows in (64, 64))
    tables = [torch.arange(4, device=device, dtype=torch.int32) * 16 + shift for shift in (0, 16, 0)]
    segments = LoraSegments(*tables, torch.arange(64, device=device, dtype=torch.int32))
    ranks = torch.full((4,), 16, device=device, dtype=torch.int32)
    return lambda: lora_shrink(x, a, segments, ranks)


# TOKENS stays below 64, where Hopper would change to another instruction: all of these give the same bits.
CANDIDATES = tuple(
    {"TOKENS": tokens, "BLOCK_K": k, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}
    for tokens in (16, 32)
    for k in (64, 128)
    for r in (16, 32)
    for warps, stages in ((2, 4), (4, 3), (4, 4))
)
DEFAULT = {"TOKENS": 32, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3}
TUNED = Tuned("lora_shrink", DEFAULT, CANDIDATES, _example)


@triton.jit
def find_tile(
    token_start, token_end, ranks, rank_stride, count, tile, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """(segment, first token, end of its tokens, rank) of a tile of the batch; rank 0 beyond the last."""
    s = tl.arange(0, SEGMENTS)
    real = s < count
    start = tl.load(token_start + s, mask=real, other=0)
    end = tl.load(token_end + s, mask=real, other=0)
    rank = tl.load(ranks + s * rank_stride, mask=real, other=0)
    tiles = tl.where((rank > 0) & (end > start), (end - start + TOKENS - 1) // TOKENS, 0)
    after = tl.cumsum(tiles, 0)
    segment = tl.sum((after <= tile).to(tl.int32), 0)
    own = s == segment
    first = tl.sum(tl.where(own, start + (tile - (after - tiles)) * TOKENS, 0), 0)
    return segment, first, tl.sum(tl.where(own, end, 0), 0), tl.sum(tl.where(own, rank, 0), 0)


@triton.jit
def project(
    x, x_stride, t, live, weight, row, row_live, keys, salt, threshold, begin, end, K,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """fp32 [TOKENS, BLOCK_R]: rows t of x times rows `row` of weight [rows, K] over columns [begin, end)."""
    acc = tl.zeros((TOKENS, BLOCK_R), tl.float32)
    x_rows = x + t.to(tl.int64)[:, None] * x_stride
    weight_rows = weight + row.to(tl.int64)[None, :] * K
    if DROPS:
        key = tl.load(keys + t, mask=live, other=0)
    for k0 in range(begin, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = k < end
        xs = tl.load(x_rows + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROPS:
            xs = tl.where(kept(key, salt, k, threshold), xs, 0.0)
        ws = tl.load(weight_rows + k[:, None], mask=inside[:, None] & row_live[None, :], other=0.0)
        acc = tl.dot(xs, ws, acc, input_precision="ieee")
    return acc


@triton.jit
def project_part(
    x, x_stride, t, live, weight, row, row_live, keys, salt, threshold, part, K, at, part_stride, inside,
    APART: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Store part `part` of a projection over K inputs; all parts, added up, unless APART."""
    if APART:
        begin = part * PART
        total = project(
            x, x_stride, t, live, weight, row, row_live, keys, salt, threshold, begin,
            tl.minimum(begin + PART, K), K, TOKENS, BLOCK_K, BLOCK_R, DROPS,
        )  # fmt: skip
        tl.store(at + part * part_stride, total, mask=inside)
    else:
        total = tl.zeros((TOKENS, BLOCK_R), tl.float32)
        for begin in range(0, K, PART):
            total += project(
                x, x_stride, t, live, weight, row, row_live, keys, salt, threshold, begin,
                tl.minimum(begin + PART, K), K, TOKENS, BLOCK_K, BLOCK_R, DROPS,
            )  # fmt: skip
        tl.store(at, total, mask=inside)


@triton.jit
def whole(h, t, live, r, r_live, parts, part_stride, R):
    """fp32 [T, R] of h: its parts in order."""
    at = t.to(tl.int64)[:, None] * R + r[None, :]
    inside = live[:, None] & r_live[None, :]
    total = tl.load(h + at, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(h + part * part_stride + at, mask=inside, other=0.0)
    return total


@triton.jit
def product(wide, narrow, acc):
    """acc + wide @ narrow; fp32 `wide` enters as two numbers of `narrow`'s type."""
    if narrow.dtype == tl.float32:
        return tl.dot(wide, narrow, acc, input_precision="ieee")
    high = wide.to(narrow.dtype)
    acc = tl.dot((wide - high.to(tl.float32)).to(narrow.dtype), narrow, acc)
    return tl.dot(high, narrow, acc)


@triton.jit
def expand(
    h, parts, part_stride, factor, weight, rows, t, live, c, c_live, rank, R, C,
    SCALES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 [TOKENS, BLOCK_C]: rows t of h [T, R], times `factor` with SCALES, and rows `rows` of weight
    [rows, C], `rank` of them, at columns c."""
    acc = tl.zeros((TOKENS, BLOCK_C), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_live = r < rank
        row = tl.load(rows + r, mask=r_live, other=0)
        hs = whole(h, t, live, r, r_live, parts, part_stride, R)
        if SCALES:
            hs = hs * factor
        ws = tl.load(
            weight + row.to(tl.int64)[:, None] * C + c[None, :],
            mask=r_live[:, None] & c_live[None, :],
            other=0.0,
        )
        acc = product(hs, ws, acc)
    return acc


@triton.jit(do_not_specialize=["salt", "count", "part_stride"])
def shrink_kernel(
    x, x_stride, a, h, part_stride, token_start, token_end, row_offset, rows, ranks, rank_stride, count,
    keys, rates, salt, K, R,
    SEGMENTS: tl.constexpr, DROPS: tl.constexpr, APART: tl.constexpr, PART: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of h fp32 [parts, T, R] = x a^T, x [T, K], a [rows, K]; with APART one part of K."""
    segment, first, end, rank = find_tile(
        token_start, token_end, ranks, rank_stride, count, tl.program_id(0), SEGMENTS, TOKENS
    )
    if rank == 0:
        return
    t = first + tl.arange(0, TOKENS)
    live = t < end
    own_rows = rows + tl.load(row_offset + segment)
    threshold = 0
    if DROPS:
        threshold = threshold_of(tl.load(rates + segment))
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_live = r < rank
        row = tl.load(own_rows + r, mask=r_live, other=0)
        project_part(
            x, x_stride, t, live, a, row, r_live, keys, salt, threshold, tl.program_id(1), K,
            h + t.to(tl.int64)[:, None] * R + r[None, :], part_stride, live[:, None] & r_live[None, :],
            APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
        )  # fmt: skip


def lora_shrink(
    x_TK: torch.Tensor,
    a_RK: torch.Tensor,
    segments: LoraSegments,
    ranks_S: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """h fp32 [parts, T, R] of `x`, set for the tokens and ranks of adapters alone."""
    (T, K), S, settings = x_TK.shape, segments.count, TUNED.on(x_TK.device)
    tiles, parts = tile_capacity(T, S, settings["TOKENS"]), cdiv(K, PART)
    apart = parts > 1 and tiles < MANY_PROGRAMS
    h_PTR = torch.empty(
        (parts if apart else 1, T, hidden_width(segments)), dtype=torch.float32, device=x_TK.device
    )
    shrink_kernel[(tiles, len(h_PTR))](
        x_TK, x_TK.stride(0), a_RK, h_PTR, h_PTR.stride(0), *tables(segments), ranks_S, ranks_S.stride(0), S,
        *dropout_arguments(dropout), K, h_PTR.shape[2],
        SEGMENTS=next_power_of_2(S), DROPS=dropout is not None, APART=apart, PART=PART, **settings,
    )  # fmt: skip
    return h_PTR


def tile_capacity(tokens: int, segments: int, tile: int) -> int:
    """Tiles that so many segments over so many tokens can have at most."""
    return cdiv(tokens, tile) + min(segments, tokens)


def hidden_width(segments: LoraSegments) -> int:
    """Columns of h: no adapter has a larger rank."""
    return cdiv(min(len(segments.rows), MAX_RANK), 16) * 16


def tables(segments: LoraSegments) -> tuple[torch.Tensor, ...]:
    """As the kernels take them."""
    return segments.token_start, segments.token_end, segments.row_offset, segments.rows


def dropout_arguments(dropout: Dropout | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """keys, rates, salt."""
    return (None, None, 0) if dropout is None else (dropout.keys_T, dropout.rates_S, dropout.salt)


def check_tables(
    device: torch.device, segments: LoraSegments, ranks: torch.Tensor, dropout: Dropout | None, tokens: int
) -> None:
    """ValueError for tables of the wrong dtype, length or device."""
    require(
        ranks.dtype == torch.int32 and ranks.shape == (segments.count,) and ranks.device == device,
        f"ranks is {ranks.dtype} {tuple(ranks.shape)} on {ranks.device}, expected int32 ({segments.count},)",
    )
    require_index(
        torch.int32,
        device,
        token_start=segments.token_start,
        token_end=segments.token_end,
        row_offset=segments.row_offset,
        rows=segments.rows,
    )
    check_dropout(device, dropout, tokens, segments.count)


def check_dropout(device: torch.device, dropout: Dropout | None, tokens: int, rates: int) -> None:
    """ValueError for keys or rates that aren't those of `tokens` tokens and so many segments."""
    if dropout is None:
        return
    keys, given = len(dropout.keys_T), len(dropout.rates_S)
    require(keys == tokens, f"dropout has {keys} keys, expected {tokens}")
    require(given == rates, f"dropout has {given} rates, expected {rates}")
    require(dropout.keys_T.device == device == dropout.rates_S.device, f"dropout is not on {device}")


TABLE_TYPES = dict.fromkeys(("token_start", "token_end", "row_offset", "rows", "ranks"), "*i32")
DROPOUT_TYPES = {"keys": "*i64:16", "rates": "*fp64", "salt": "i64"}


def _cases() -> list[AotCase]:
    cases = []
    for dtype, drops, apart in (
        ("bf16", False, False), ("bf16", False, True), ("bf16", True, False), ("fp16", False, True),
        ("fp32", False, True),
    ):  # fmt: skip
        x = f"*{dtype}:16"
        signature = {
            "x": x,
            "x_stride": "i32:16",
            "a": x,
            "h": "*fp32:16",
            "part_stride": "i32",
            **TABLE_TYPES,
        }
        signature |= {"rank_stride": "i32", "count": "i32", "salt": "i32", "K": "i32:16", "R": "i32:16"}
        constants: dict[str, Any] = {"SEGMENTS": 32, "DROPS": drops, "APART": apart, "PART": PART}
        if drops:
            signature |= DROPOUT_TYPES
        else:
            constants |= {"keys": None, "rates": None}
        cases.append(AotCase(shrink_kernel, signature, constants, TUNED, hot=dtype == "bf16"))
    return cases


AOT_CASES = _cases()
