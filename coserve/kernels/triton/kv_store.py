"""Writing keys and values into the paged cache, a token a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import require_rows, require_same
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    k, v = torch.randn(2, 256, 8, 128, device=device, dtype=torch.bfloat16)
    caches = torch.empty(2, 64, 16, 8, 128, device=device, dtype=torch.bfloat16)
    slots = torch.arange(256, device=device)
    return lambda: kv_store(k, v, caches[0], caches[1], slots)


SETTINGS = ({"BLOCK": b, "num_warps": w, "num_stages": 1} for b in (512, 1024) for w in (2, 4))
TUNED = Tuned("kv_store", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def kv_store_kernel(
    k, k_stride, v, v_stride, k_cache, k_cache_stride, v_cache, v_cache_stride, slots, width, block_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """k and v [T, width], rows k_stride and v_stride apart, to their int64 slots in caches of blocks of
    block_size tokens, k_cache_stride and v_cache_stride apart."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        block, offset = slot // block_size, slot % block_size
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            key = tl.load(k + token * k_stride + column, inside)
            tl.store(k_cache + block * k_cache_stride + offset * width + column, key, inside)
            value = tl.load(v + token * v_stride + column, inside)
            tl.store(v_cache + block * v_cache_stride + offset * width + column, value, inside)


def kv_store(
    k_TND: torch.Tensor,
    v_TND: torch.Tensor,
    k_cache_BSND: torch.Tensor,
    v_cache_BSND: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """As the public function; nothing is stored for negative slots."""
    check_caches(k_TND, v_TND, k_cache_BSND, v_cache_BSND)
    require_index(torch.int64, k_TND.device, slots=slots_T)
    T, N, D = k_TND.shape
    require(len(slots_T) == T, f"{len(slots_T)} slots for {T} tokens")
    if T:
        kv_store_kernel[(T,)](
            k_TND,
            k_TND.stride(0),
            v_TND,
            v_TND.stride(0),
            k_cache_BSND,
            k_cache_BSND.stride(0),
            v_cache_BSND,
            v_cache_BSND.stride(0),
            slots_T,
            N * D,
            k_cache_BSND.shape[1],
            **TUNED.on(k_TND.device),
        )


def check_caches(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Keys, values and caches fit each other; ValueError if not."""
    require_same(k, v=v, k_cache=k_cache, v_cache=v_cache)
    require_rows(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    require(v.shape == k.shape, f"v {tuple(v.shape)}, k {tuple(k.shape)}")
    require(k_cache.shape[2:] == k.shape[1:], f"k_cache {tuple(k_cache.shape)}, k {tuple(k.shape)}")
    require(v_cache.shape == k_cache.shape, "k_cache and v_cache differ in shape")


AOT_CASES = [
    AotCase(
        kv_store_kernel,
        {name: f"*{dtype}:16" for name in ("k", "v", "k_cache", "v_cache")}
        | {name: "i32:16" for name in ("k_stride", "v_stride", "k_cache_stride", "v_cache_stride", "width")}
        | {"slots": "*i64:16", "block_size": "i32"},
        {},
        TUNED,
    )
    for dtype in ("bf16", "fp32")
]
