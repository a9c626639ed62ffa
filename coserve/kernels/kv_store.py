"""Writing new keys and values into the paged cache."""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import (
    is_index,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
)


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
        store = triton_or_reference(k_TND, _kv_store_reference)
        return store(k_TND, v_TND, k_cache_BSND, v_cache_BSND, slots_T)
    T, N, D = k_TND.shape
    block_size, inner, dtype = k_cache_BSND.shape[1], (D, 1), k_TND.dtype
    if not (
        v_TND.dtype is dtype
        and k_cache_BSND.dtype is dtype
        and v_cache_BSND.dtype is dtype
        and k_TND.stride()[1:] == inner
        and v_TND.stride()[1:] == inner
        and v_TND.shape == k_TND.shape
        and k_cache_BSND.stride()[1:] == (N * D, D, 1)
        and v_cache_BSND.stride()[1:] == (N * D, D, 1)
        and k_cache_BSND.shape == v_cache_BSND.shape
        and k_cache_BSND.shape[2:] == (N, D)
        and is_index(slots_T, torch.int64)
        and slots_T.numel() == T
    ):
        _check(k_TND, v_TND, k_cache_BSND, v_cache_BSND, slots_T)
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


def _check(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    require_like(k, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    require_index(torch.int64, slots=slots)
    require(v.shape == k.shape, f"v {tuple(v.shape)}, k {tuple(k.shape)}")
    require(k_cache.shape[2:] == k.shape[1:], f"k_cache {tuple(k_cache.shape)}, k {tuple(k.shape)}")
    require(v_cache.shape == k_cache.shape, "k_cache and v_cache differ in shape")
    require(len(slots) == len(k), f"{len(slots)} slots for {len(k)} tokens")


def _kv_store_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    kept = slots >= 0
    block_size = k_cache.shape[1]
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    k_cache[block, offset] = k[kept]
    v_cache[block, offset] = v[kept]
