"""Writing new keys and values into the paged cache."""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import native_for, require, require_index, require_like


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
    native = native_for(k_TND)
    if native is None:
        return _kv_store_reference(k_TND, v_TND, k_cache_BSND, v_cache_BSND, slots_T)
    T, N, D = k_TND.shape
    require_like(k_TND, k=k_TND, v=v_TND, k_cache=k_cache_BSND, v_cache=v_cache_BSND)
    require_index(torch.int64, slots=slots_T)
    block_size = k_cache_BSND.shape[1]
    require(v_TND.shape == k_TND.shape, f"v {tuple(v_TND.shape)}, k {tuple(k_TND.shape)}")
    require(k_cache_BSND.shape[2:] == (N, D), f"k_cache {tuple(k_cache_BSND.shape)}, k {tuple(k_TND.shape)}")
    require(v_cache_BSND.shape == k_cache_BSND.shape, "k_cache and v_cache differ in shape")
    require(len(slots_T) == T, f"{len(slots_T)} slots for {T} tokens")
    native.kv_store(
        k_TND.element_size(),
        k_TND.data_ptr(),
        k_TND.stride(0),
        v_TND.data_ptr(),
        v_TND.stride(0),
        k_cache_BSND.data_ptr(),
        k_cache_BSND.stride(0),
        v_cache_BSND.data_ptr(),
        v_cache_BSND.stride(0),
        slots_T.data_ptr(),
        T,
        N * D,
        block_size,
    )


def _kv_store_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    kept = slots >= 0
    block_size = k_cache.shape[1]
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    k_cache[block, offset] = k[kept]
    v_cache[block, offset] = v[kept]
