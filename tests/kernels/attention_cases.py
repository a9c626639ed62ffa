"""Inputs of paged and window attention, and what both devices' kernels must do with them."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.kv_store import kv_store
from coserve.kernels.paged_attention import paged_attention
from coserve.kernels.window_attention import window_attention, window_attention_backward
from tests.kernels.oracle import check, error, ints


def paged_case(
    lengths: list[int],
    queries: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    block_size: int = 16,
) -> tuple:
    """q, caches in a slab [block, k or v, ...] with scattered blocks and NaN where nothing was stored."""
    N, Nkv, D = heads
    blocks = [-(-length // block_size) for length in lengths]
    slab = torch.full((sum(blocks) + 2, 2, block_size, Nkv, D), float("nan"), dtype=dtype)
    order = torch.randperm(sum(blocks) + 2)[: sum(blocks)].int()
    tables = torch.zeros(len(lengths), max(max(blocks, default=0), 1), dtype=torch.int32)
    for s, (table, length) in enumerate(zip(order.split(blocks), lengths, strict=True)):
        tables[s, : len(table)] = table
        token = torch.arange(length)
        slots = table.long()[token // block_size] * block_size + token % block_size
        new = torch.randn(2, length, Nkv, D).to(dtype)
        kv_store(new[0], new[1], slab[:, 0], slab[:, 1], slots)
    q = torch.randn(sum(queries), N, D).to(dtype)
    starts = ints(0, *torch.tensor(queries).cumsum(0).tolist())
    return q, slab[:, 0], slab[:, 1], tables, starts, ints(*lengths), D**-0.5


def stream(T: int, heads: tuple[int, int, int], dtype: torch.dtype, samples: tuple[int, ...]) -> tuple:
    """q, k, v, do and the first key that each query sees: its sample's."""
    N, Nkv, D = heads
    q, do = torch.randn(T, N, D).to(dtype), (torch.randn(T, N, D) / D**0.5).to(dtype)
    k, v = torch.randn(T, Nkv, D).to(dtype), torch.randn(T, Nkv, D).to(dtype)
    sample_start = torch.zeros(T, dtype=torch.int32)
    for start in samples:
        sample_start[start:] = start
    return q, k, v, do, sample_start


def sliding(sample_start: torch.Tensor, window: int) -> torch.Tensor:
    """The first key of each query under a sliding window."""
    return torch.maximum(sample_start, torch.arange(len(sample_start), dtype=torch.int32) + 1 - window)


def sharing(*runs: tuple[int, tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """First keys and gaps of a stream where each run is a prefix of so many tokens and its readers' own."""
    first: list[int] = []
    gaps: list[tuple[int, int]] = []
    for prefix, own in runs:
        begin = len(first)
        first += [begin] * prefix
        gaps += [(0, 0)] * prefix
        for length in own:
            gaps += [(begin + prefix, len(first))] * length
            first += [begin] * length
    return ints(*first), torch.tensor(gaps, dtype=torch.int32)


def check_window(
    case: tuple, window_start: int, cap: float, low_slack: float, gaps: torch.Tensor | None = None
) -> None:
    """Forward and backward of a window of `case` against float64, the sums begun with something in them."""
    q, k, v, do, first_key = case
    scale, starts = q.shape[2] ** -0.5, first_key[window_start:]
    own = None if gaps is None else gaps[window_start:]

    def run(q, k, v, do):  # type: ignore[no-untyped-def]
        o, lse = window_attention(q, k, v, starts, window_start, scale, cap, own)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = torch.full(k.shape, 0.5, dtype=wide), torch.full(v.shape, -0.5, dtype=wide)
        dq = window_attention_backward(do, q, o, lse, k, v, starts, window_start, scale, dk, dv, cap, own)
        return o, lse, dq, dk, dv

    check(run, q[window_start:], k, v, do[window_start:], bound=4e-6, low_slack=low_slack)


def in_windows(T: int, cut: int, case: tuple, gaps: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """o, lse, dq, dk, dv of a stream in windows of `cut`, forward first to last, backward last to first."""
    q, k, v, do, sample_start = case
    edges = [(a, min(a + cut, T)) for a in range(0, T, cut)]
    own = [None if gaps is None else gaps[a:b] for a, b in edges]
    parts = [
        window_attention(q[a:b], k, v, sample_start[a:b], a, 0.125, 0.0, gap)
        for (a, b), gap in zip(edges, own, strict=True)
    ]
    dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)
    dq = torch.empty_like(q)
    for (a, b), (o, lse), gap in reversed(list(zip(edges, parts, own, strict=True))):
        dq[a:b] = window_attention_backward(
            do[a:b], q[a:b], o, lse, k, v, sample_start[a:b], a, 0.125, dk, dv, 0.0, gap
        )
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts]), dq, dk, dv


def check_readers_alone(dtype: torch.dtype, bound: float) -> None:
    """A prefix and its readers give what each reader gives beside a copy of the prefix; the prefix's dk and
    dv are the sums over the copies."""
    prefix, own = 70, (33, 5, 80)
    T, heads = prefix + sum(own), (4, 2, 16)
    first, gaps = sharing((prefix, own))
    q, k, v, do, _ = stream(T, heads, dtype, ())
    do[:prefix] = 0  # the copies would count its own queries thrice
    o, lse, dq, dk, dv = in_windows(T, T, (q, k, v, do, first), gaps)
    sums = torch.zeros(2, prefix, *k.shape[1:])
    begin = prefix
    for length in own:
        rows = torch.cat([torch.arange(prefix), torch.arange(begin, begin + length)])
        copy = *(x[rows].contiguous() for x in (q, k, v, do)), torch.zeros(len(rows), dtype=torch.int32)
        parts = in_windows(len(rows), len(rows), copy)
        mine = slice(begin, begin + length)
        for got, want in zip((o, lse, dq, dk, dv), parts, strict=True):
            assert error(got[mine], want[prefix:].double()) < bound
        sums += torch.stack([parts[3][:prefix], parts[4][:prefix]])
        begin += length
    assert error(torch.stack([dk[:prefix], dv[:prefix]]), sums.double()) < bound


def check_column_slices() -> None:
    """q, k and v may lie side by side; what is not dense in its heads is refused."""
    merged = torch.randn(20, 8, 16)
    q, k, v = merged[:, :4], merged[:, 4:6], merged[:, 6:]
    starts = torch.zeros(20, dtype=torch.int32)
    sliced = window_attention(q, k, v, starts, 0, 0.25)
    copied = window_attention(q.contiguous(), k.contiguous(), v.contiguous(), starts, 0, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(sliced, copied, strict=True))
    with pytest.raises(ValueError, match="q of strides"):
        window_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, starts, 0, 0.25)
    with pytest.raises(ValueError, match=r"gaps must be \[20, 2\]"):
        window_attention(q, k, v, starts, 0, 0.25, 0.0, starts)
    with pytest.raises(ValueError, match="window ends"):
        window_attention(q, k, v, starts, 1, 0.25)


def check_refusals(other: torch.dtype) -> None:
    """Paged attention refuses tables, caches of an `other` dtype and heads that don't fit."""
    q, k, v, tables, starts, lengths, scale = paged_case([4], [1], (2, 1, 16), torch.float32)
    with pytest.raises(ValueError, match="block_tables"):
        paged_attention(q, k, v, tables.long(), starts, lengths, scale)
    with pytest.raises(ValueError, match="k_cache"):
        paged_attention(q, k.to(other), v, tables, starts, lengths, scale)
    with pytest.raises(ValueError, match="multiple"):
        paged_attention(
            q.repeat(1, 2, 1)[:, :3], k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), tables, starts, lengths, 1.0
        )
