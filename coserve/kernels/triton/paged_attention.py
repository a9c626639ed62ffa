"""Paged attention for ragged decode and prefill on CUDA: one kernel for both, formula as in the CPU's file.

A program takes a tile of rows (tokens of one sequence x the heads of one KV head) and finds its sequence in
`query_start` by itself: the grid depends on shapes alone, programs beyond the work end at once, and nothing
is read back. Keys are cut into splits of SPLIT keys anchored at key 0. A sequence with one query spreads its
splits over programs and a second kernel joins them; a tile of a longer one walks them in the same order and
joins them by the same arithmetic, so decode and prefill of a position agree to the bit (flash-decoding, Dao
et al. 2023, with split points that no batch moves).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.attention_tile import attend, join, settings_for, tuned_by_dim
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_rows, require_same
from coserve.kernels.triton.tuning import Tuned

SPLIT = 512  # keys


def _example(device: torch.device, dim: int) -> Callable[[], torch.Tensor]:
    """32 sequences of 1024 keys that decode beside a prompt of 512 tokens."""
    S, blocks = 33, 64
    like = {"device": device, "dtype": torch.bfloat16}
    q, cache = torch.randn(544, 32, dim, **like), torch.randn(2, S * blocks, 16, 8, dim, **like)
    tables = torch.randperm(S * blocks, device=device).int().view(S, blocks)
    starts = torch.tensor([*range(33), 544], dtype=torch.int32, device=device)
    lengths = torch.tensor([*[1024] * 32, 512], dtype=torch.int32, device=device)
    return lambda: paged_attention(q, *cache, tables, starts, lengths, dim**-0.5, 0, 0.0)


TUNED = tuned_by_dim(
    "paged_attention",
    {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    _example,
)
VARYING = ["table_stride", "S", "parts"]  # from step to step: compiled once, whatever their values
LEAST_SEQUENCES = 64  # that a compiled form has room for; then the powers of two
TUNED_JOIN = Tuned("join_splits", {"num_warps": 4, "num_stages": 3})


@triton.jit(do_not_specialize=VARYING)
def paged_attention_kernel(
    q, q_stride, k, v, k_block_stride, v_block_stride, k_stride, v_stride, table, table_stride, query_start,
    context_lens, S, N, parts, window, scale, soft_cap, o, part_o, part_sums,
    GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT_KEYS: tl.constexpr, S_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, Nkv, parts)."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Sequence s has the tiles from query_start[s] // TOKENS + s on: at least as many as it needs.
    s_S = tl.arange(0, S_PADDED)
    start_S = tl.load(query_start + s_S, mask=s_S < S, other=0)
    s = tl.sum(((start_S // TOKENS + s_S <= tile) & (s_S < S)).to(tl.int32), 0) - 1
    start = tl.load(query_start + s)
    queries = tl.load(query_start + s + 1) - start
    token = (tile - start // TOKENS - s) * TOKENS
    if token >= queries:
        return
    context = tl.load(context_lens + s)
    position = context - queries + token
    end = tl.minimum(position + TOKENS, context)
    first = tl.maximum(position + 1 - window, 0)
    if window == 0:
        first = 0
    first_split, last_split = first // SPLIT_KEYS, (end - 1) // SPLIT_KEYS
    spread = (queries == 1) & (first_split < last_split)
    if lane > tl.where(spread, last_split - first_split, 0):
        return

    row_M, d_D = tl.arange(0, BLOCK_M), tl.arange(0, D_PADDED)
    token_M, head_M = token + row_M // GROUP, kv_head * GROUP + row_M % GROUP
    live_M = (row_M < TOKENS * GROUP) & (token_M < queries)
    last_M = tl.where(live_M, context - queries + token_M, -1)
    first_M = tl.where(window > 0, last_M + 1 - window, 0)
    mask_MD = live_M[:, None] & (d_D < D)[None, :]
    q_row_M = (start + token_M).to(tl.int64) * q_stride + head_M * D
    q_MD = tl.load(q + q_row_M[:, None] + d_D[None, :], mask=mask_MD, other=0.0)

    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    o_MD = tl.zeros((BLOCK_M, D_PADDED), tl.float32)
    last_split = tl.where(spread, first_split + lane, last_split)
    table_of_s = table + s.to(tl.int64) * table_stride
    for split in range(first_split + lane, last_split + 1):
        begin = tl.maximum(split * SPLIT_KEYS, first // BLOCK_N * BLOCK_N)
        stop = tl.minimum((split + 1) * SPLIT_KEYS, end)
        top_new_M, total_new_M, o_new_MD = attend(
            q_MD, first_M, last_M, begin, stop, k + kv_head * D, v + kv_head * D, table_of_s, k_block_stride,
            v_block_stride, k_stride, v_stride, scale, soft_cap, D, BLOCK_N, BLOCK_SIZE, CAPPED, first_M,
            first_M, False,
        )  # fmt: skip
        top_M, total_M, o_MD = join(top_M, total_M, o_MD, top_new_M, total_new_M, o_new_MD)
    if spread:
        part_M = (s.to(tl.int64) * parts + lane) * N + head_M
        tl.store(part_o + part_M[:, None] * D + d_D[None, :], o_MD, mask=mask_MD)
        tl.store(part_sums + part_M * 2, top_M, mask=live_M)
        tl.store(part_sums + part_M * 2 + 1, total_M, mask=live_M)
    else:
        o_row_M = ((start + token_M).to(tl.int64) * N + head_M) * D
        out_MD = (o_MD / tl.where(total_M == 0, 1.0, total_M)[:, None]).to(o.dtype.element_ty)
        tl.store(o + o_row_M[:, None] + d_D[None, :], out_MD, mask=mask_MD)


@triton.jit(do_not_specialize=["parts"])
def join_splits_kernel(
    query_start, context_lens, N, parts, window, o, part_o, part_sums,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (S, Nkv): the output of a sequence whose one query was spread over splits, in their order."""
    s, kv_head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start + s)
    queries = tl.load(query_start + s + 1) - start
    context = tl.load(context_lens + s)
    first = tl.maximum(context - window, 0)
    if window == 0:
        first = 0
    first_split, last_split = first // SPLIT_KEYS, (context - 1) // SPLIT_KEYS
    if (queries != 1) | (first_split >= last_split):
        return
    row_M, d_D = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED)
    live_M = row_M < GROUP
    mask_MD = live_M[:, None] & (d_D < D)[None, :]
    head_M = kv_head * GROUP + row_M
    top_M = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total_M = tl.zeros((GROUP_PADDED,), tl.float32)
    o_MD = tl.zeros((GROUP_PADDED, D_PADDED), tl.float32)
    for split in range(0, last_split - first_split + 1):
        part_M = (s.to(tl.int64) * parts + split) * N + head_M
        top_new_M = tl.load(part_sums + part_M * 2, mask=live_M, other=float("-inf"))
        total_new_M = tl.load(part_sums + part_M * 2 + 1, mask=live_M, other=0.0)
        o_new_MD = tl.load(part_o + part_M[:, None] * D + d_D[None, :], mask=mask_MD, other=0.0)
        top_M, total_M, o_MD = join(top_M, total_M, o_MD, top_new_M, total_new_M, o_new_MD)
    o_row_M = (start.to(tl.int64) * N + head_M) * D
    out_MD = (o_MD / tl.where(total_M == 0, 1.0, total_M)[:, None]).to(o.dtype.element_ty)
    tl.store(o + o_row_M[:, None] + d_D[None, :], out_MD, mask=mask_MD)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> torch.Tensor:
    """Output [T, N, D] in q's dtype; rows from query_start[S] on are padding and their output undefined."""
    _check(q_TND, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S)
    (T, N, D), S, device = q_TND.shape, len(context_lens_S), q_TND.device
    block_size, Nkv = k_cache.shape[1], k_cache.shape[2]
    o_TND = torch.empty((T, N, D), dtype=q_TND.dtype, device=device)
    if T == 0 or S == 0:
        return o_TND
    parts = cdiv(block_tables_SB.shape[1] * block_size, SPLIT)
    if window:
        parts = min(parts, cdiv(window, SPLIT) + 1)
    part_o = torch.empty((S if parts > 1 else 0, parts, N, D), dtype=torch.float32, device=device)
    part_sums = torch.empty((*part_o.shape[:3], 2), dtype=torch.float32, device=device)
    settings = settings_for(TUNED, q_TND, N // Nkv)
    tiles = T // (settings["BLOCK_M"] // settings["GROUP"]) + S
    paged_attention_kernel[(tiles, Nkv, parts)](
        q_TND, q_TND.stride(0), k_cache, v_cache, k_cache.stride(0), v_cache.stride(0), k_cache.stride(1),
        v_cache.stride(1), block_tables_SB, block_tables_SB.stride(0), query_start_S1, context_lens_S, S, N,
        parts, window, scale, soft_cap, o_TND, part_o, part_sums, CAPPED=soft_cap > 0, BLOCK_SIZE=block_size,
        SPLIT_KEYS=SPLIT, S_PADDED=max(LEAST_SEQUENCES, next_power_of_2(S)), **settings,
    )  # fmt: skip
    if parts > 1:
        join_splits_kernel[(S, Nkv)](
            query_start_S1, context_lens_S, N, parts, window, o_TND, part_o, part_sums, N // Nkv,
            next_power_of_2(N // Nkv), D, settings["D_PADDED"], SPLIT, **TUNED_JOIN.on(device),
        )  # fmt: skip
    return o_TND


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    N, Nkv, S = q.shape[1], k_cache.shape[2], len(context_lens)
    require_same(q, k_cache=k_cache, v_cache=v_cache)
    require_rows(q=q, k_cache=k_cache, v_cache=v_cache)
    require_index(
        torch.int32, q.device, query_start=query_start, context_lens=context_lens, block_tables=tables
    )
    require(k_cache.shape == v_cache.shape, "k_cache and v_cache differ in shape")
    require(k_cache.shape[3] == q.shape[2], f"head dim of k_cache {k_cache.shape[3]}, of q {q.shape[2]}")
    require(N % Nkv == 0, f"{N} query heads are no multiple of {Nkv} KV heads")
    require(len(query_start) == S + 1 and len(tables) == S, f"tables are not those of {S} sequences")


def _cases() -> list[AotCase]:
    cases = []
    dims = [*(("bf16", D) for D in (64, 80, 96, 128, 256)), *(("fp16", D) for D in (64, 128, 256))]
    for dtype, D in [*dims, ("fp32", 128)]:
        dim, padded = max(64, next_power_of_2(D)), next_power_of_2(D)
        x, index = f"*{dtype}:16", "*i32:16"
        signature = {"q": x, "q_stride": "i32:16", "k": x, "v": x, "o": x}
        signature |= dict.fromkeys(("k_block_stride", "v_block_stride", "k_stride", "v_stride"), "i32:16")
        signature |= {"table": index, "table_stride": "i32", "query_start": index, "context_lens": index}
        signature |= dict.fromkeys(("S", "N", "parts", "window"), "i32")
        signature |= {"scale": "fp32", "soft_cap": "fp32", "part_o": "*fp32:16", "part_sums": "*fp32:16"}
        shape = {"GROUP": 7 if D == 64 else 4, "D": D, "D_PADDED": padded, "CAPPED": D == 256}
        shape |= {"BLOCK_SIZE": 16, "SPLIT_KEYS": SPLIT, "S_PADDED": 256}
        tuned = TUNED[dim, dtype == "fp32"]
        cases.append(AotCase(paged_attention_kernel, signature, shape, tuned, hot=dtype != "fp32"))
        if dtype == "bf16" and D in (64, 256):
            kept = {name: signature[name] for name in signature if name in join_splits_kernel.arg_names}
            shape = {"GROUP": 7, "GROUP_PADDED": 8, "D": D, "D_PADDED": padded, "SPLIT_KEYS": SPLIT}
            cases.append(AotCase(join_splits_kernel, kept, shape, TUNED_JOIN))
    return cases


AOT_CASES = _cases()
