"""Adapters, segments and windows for the LoRA kernels of both devices."""

from __future__ import annotations

import torch

from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraSegments
from tests.kernels.oracle import ints, lora_backward_one

POOL = 300


def pool(N: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A [POOL, K] and B [POOL, N] of one module."""
    return (torch.randn(POOL, K) / K**0.5).to(dtype), torch.randn(POOL, N).to(dtype)


def segments(*spans: tuple[int, int, int]) -> tuple[LoraSegments, torch.Tensor]:
    """Of (start, end, rank): each segment's rows are scattered over the pool."""
    ranks = [rank for *_, rank in spans]
    offsets = [sum(ranks[:s]) for s in range(len(ranks))]
    rows = torch.randperm(POOL)[: sum(ranks)].int()
    starts, ends = ints(*(a for a, _, _ in spans)), ints(*(b for _, b, _ in spans))
    return LoraSegments(starts, ends, ints(*offsets), rows), ints(*ranks)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dx: torch.Tensor,
    rows: torch.Tensor,
    offset: int = 0,
    drop: Dropout | None = None,
) -> tuple[torch.Tensor, ...]:
    """dx, da, db of a window, the last two begun with ones."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    da, db = (torch.ones(len(rows), like.shape[1], dtype=wide) for like in (a, b))
    lora_backward_one(dy, x, a, b, rows, dx, da, db, offset, drop)
    return dx, da, db


def in_windows(
    cut: int, dy: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """dx, da, db of all tokens in windows of `cut`, last to first."""
    dx, da, db = torch.zeros_like(x), torch.zeros(len(rows), a.shape[1]), torch.zeros(len(rows), b.shape[1])
    for at in reversed(range(0, len(x), cut)):
        span = slice(at, at + cut)
        lora_backward_one(dy[span], x[span], a, b, rows, dx[span], da, db, at)
    return dx, da, db
