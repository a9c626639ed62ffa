"""What lies between the merged q, k, v product and attention, of all rows of a step at once.

    q, k -> rope(norm(q)), rope(norm(k));   cache[slot] = k, v   for the rows that have a slot

The parts are rms_norm.py, rope.py and kv_store.py, one after the other on the CPU; on a GPU they are one
kernel, for decoding a few rows is otherwise mostly launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from coserve.kernels.dispatch import native_for, triton_or_reference
from coserve.kernels.kv_store import kv_store
from coserve.kernels.rms_norm import rms_norm
from coserve.kernels.rope import apply_rope_


class HeadNorms(NamedTuple):
    """Norm weights of q and k, [D] for each head by itself or [heads * D] for a token's whole projection."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class CacheSlots(NamedTuple):
    """Where the first rows' keys and values go; as in kv_store.py, one slot for each of those rows."""

    k_cache_BSND: torch.Tensor
    v_cache_BSND: torch.Tensor
    slots_T: torch.Tensor


def norm_rope_store(
    qkv_TMD: torch.Tensor,
    heads: int,
    positions_T: torch.Tensor,
    cos_PD2: torch.Tensor,
    sin_PD2: torch.Tensor,
    norms: HeadNorms | None,
    cache: CacheSlots | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(q, k, v)` [T, heads, D] of `qkv` [T, heads + 2 Nkv, D], rotated in place without norms."""
    run = _norm_rope_store_reference
    if native_for(qkv_TMD) is None and (norms is None or norms.q_weight.numel() == qkv_TMD.shape[2]):
        run = triton_or_reference(qkv_TMD, _norm_rope_store_reference)
    return run(qkv_TMD, heads, positions_T, cos_PD2, sin_PD2, norms, cache)


def _norm_rope_store_reference(
    qkv: torch.Tensor,
    heads: int,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
    cache: CacheSlots | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the operations that it is made of, each on the backend that it has."""
    rotated = (heads + qkv.shape[1]) // 2
    if norms is None:
        apply_rope_(qkv[:, :rotated], positions, cos, sin)
        q, k = qkv[:, :heads], qkv[:, heads:rotated]
    else:
        q = apply_rope_(_norm(qkv[:, :heads], norms.q_weight, norms.eps), positions, cos, sin)
        k = apply_rope_(_norm(qkv[:, heads:rotated], norms.k_weight, norms.eps), positions, cos, sin)
    v = qkv[:, rotated:]
    if cache is not None:
        rows = len(cache.slots_T)
        kv_store(k[:rows], v[:rows], *cache)
    return q, k, v


def _norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    if w.numel() == x.shape[2]:
        return rms_norm(x, w, eps)
    return rms_norm(x.flatten(1), w, eps).view(x.shape)
