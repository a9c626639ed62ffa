"""Writing new keys and values into the paged cache."""

from __future__ import annotations

import torch


def kv_store(
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    k_cache_BSND: torch.Tensor,
    v_cache_BSND: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """cache[slot // block_size, slot % block_size] = k or v of the token, for every slot >= 0.

    `k`, `v` [T, N, D] and the caches [B, block_size, N, D] have one dtype; token and block strides are free,
    inner dimensions contiguous. `slots` [T] int64; a negative slot stores nothing.
    """
    _kv_store_reference(k_TND, v_TND, k_cache_BSND, v_cache_BSND, slots_T)


def _kv_store_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    kept = slots >= 0
    block_size = k_cache.shape[1]
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    k_cache[block, offset] = k[kept]
    v_cache[block, offset] = v[kept]
