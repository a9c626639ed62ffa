"""Norms, rotation and KV store in one kernel, beside the operations that they are made of."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.dispatch import use_backend
from coserve.kernels.norm_rope_store import CacheSlots, HeadNorms, norm_rope_store
from tests.kernels.oracle import INTERPRETED_DTYPES

ROWS, HEADS, KV_HEADS, DIM = 5, 6, 2, 12


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("half", (6, 4))
@pytest.mark.parametrize("norm", ("none", "own", "wide"))
def test_beside_the_single_operations(norm: str, half: int, dtype: torch.dtype) -> None:
    qkv, angles = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM, dtype=dtype), torch.randn(9, half)
    positions, slots = torch.tensor([3, 0, 8, 1, 2]), torch.tensor([5, -1, 2])
    weights = torch.randn(2, DIM, dtype=torch.float32 if norm == "wide" else dtype)
    norms = None if norm == "none" else HeadNorms(weights[0], weights[1], 1e-6)
    made = []
    for backend in ("reference", "triton"):
        slab = torch.full((2, 2, 4, KV_HEADS, DIM), 7.0, dtype=dtype)
        cache = CacheSlots(slab[:, 0], slab[:, 1], slots)
        with use_backend(backend):
            parts = norm_rope_store(qkv.clone(), HEADS, positions, angles.cos(), angles.sin(), norms, cache)
        made.append([*parts, slab])
    bound = {torch.float32: 1e-6, torch.float16: 4e-3}[dtype]
    for want, got in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def test_whole_projections_are_normed_by_their_own_operation() -> None:
    qkv, angles = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), torch.randn(9, 6)
    norms = HeadNorms(torch.randn(HEADS * DIM), torch.randn(KV_HEADS * DIM), 1e-6)
    tables = torch.arange(ROWS), angles.cos(), angles.sin()
    got = norm_rope_store(qkv.clone(), HEADS, *tables, norms, None)
    with use_backend("reference"):
        want = norm_rope_store(qkv.clone(), HEADS, *tables, norms, None)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    qkv, table = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), torch.randn(9, 6)
    with pytest.raises(ValueError, match="contiguous"):
        norm_rope_store(qkv[:, :, ::2], HEADS, torch.arange(ROWS), table, table, None, None)
    with pytest.raises(ValueError, match="positions"):
        norm_rope_store(qkv, HEADS, torch.arange(ROWS - 1), table, table, None, None)
