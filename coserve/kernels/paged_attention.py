"""Causal attention of ragged decode and prefill rows over the paged cache (Kwon et al. 2023).

    o[t, n] = sum_j softmax_j(scale * q[t, n] . k[j, n // group]) v[j, n // group],   j <= position of t

With a sliding window of w, only the last w of these keys are seen (Beltagy et al. 2020); with a soft cap c,
scores u become c * tanh(u / c) (Gemma 2).

The keys of a sequence are cut into chunks of 512 and blocks of 64 anchored at its key 0: an online softmax
over a chunk's blocks (Dao et al. 2022), the chunks merged in ascending order, whoever computed them (flash
decoding's split, at fixed points). So a token's output depends neither on its batch nor on the threads.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    is_index,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
    wide,
)


def paged_attention(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_SB: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Output [T, N, D] in q's dtype.

    Sequence s owns queries query_start[s]:query_start[s + 1], its last tokens; context_lens[s] counts all
    its keys including those of the queries, found through block_tables[s]. Caches are
    [B, block_size, Nkv, D] with a free block stride; tables, starts and lengths are int32. A query sees
    `window` keys, its own among them (0: all); `soft_cap` 0 is none.
    """
    native = native_for(q_TND)
    if native is None:
        return triton_or_reference(q_TND, _paged_attention_reference)(
            q_TND, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, scale, window, soft_cap
        )
    (_, N, D), dtype, S = q_TND.shape, q_TND.dtype, context_lens_S.numel()
    block_size, Nkv = k_cache.shape[1], k_cache.shape[2]
    if not (
        k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and q_TND.stride()[1:] == (D, 1)
        and k_cache.stride()[1:] == (Nkv * D, D, 1)
        and v_cache.stride()[1:] == (Nkv * D, D, 1)
        and k_cache.shape == v_cache.shape
        and k_cache.shape[3] == D
        and N % Nkv == 0
        and is_index(block_tables_SB, torch.int32)
        and is_index(query_start_S1, torch.int32)
        and is_index(context_lens_S, torch.int32)
        and query_start_S1.numel() == S + 1
        and block_tables_SB.shape[0] == S
        and scale > 0
    ):
        _check(q_TND, k_cache, v_cache, block_tables_SB, query_start_S1, context_lens_S, scale)
    o_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype)
    native.paged_attention(
        DTYPE_CODES[q_TND.dtype],
        q_TND.data_ptr(),
        q_TND.stride(0),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.stride(0),
        v_cache.stride(0),
        block_size,
        block_tables_SB.data_ptr(),
        block_tables_SB.stride(0),
        query_start_S1.data_ptr(),
        context_lens_S.data_ptr(),
        S,
        N,
        Nkv,
        D,
        scale,
        window,
        soft_cap,
        o_TND.data_ptr(),
    )
    return o_TND


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> None:
    N, Nkv, S = q.shape[1], k_cache.shape[2], len(context_lens)
    require_like(q, q=q, k_cache=k_cache, v_cache=v_cache)
    require_index(torch.int32, query_start=query_start, context_lens=context_lens, block_tables=block_tables)
    require(k_cache.shape == v_cache.shape, "k_cache and v_cache differ in shape")
    require(k_cache.shape[3] == q.shape[2], f"head dim of k_cache {k_cache.shape[3]}, of q {q.shape[2]}")
    require(N % Nkv == 0, f"{N} query heads are no multiple of {Nkv} KV heads")
    require(scale > 0, f"scale must be positive, not {scale}")
    require(len(query_start) == S + 1 and len(block_tables) == S, f"tables are not those of {S} sequences")


def _paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_size = k_cache.shape[1]
    group = q.shape[1] // k_cache.shape[2]
    starts, lengths = query_start.tolist(), context_lens.tolist()
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        blocks = block_tables[s, : -(-length // block_size)].long()
        k = wide(k_cache[blocks].flatten(0, 1)[:length]).repeat_interleave(group, 1)
        v = wide(v_cache[blocks].flatten(0, 1)[:length]).repeat_interleave(group, 1)
        scores = torch.einsum("tnd,jnd->ntj", wide(q[begin:end]), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        hidden = (key > position) | (key <= position - (window or length))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("ntj,jnd->tnd", weights, v).to(q.dtype)
    return out
