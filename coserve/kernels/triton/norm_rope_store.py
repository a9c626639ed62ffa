"""Norms of q and k, rotary embedding and the KV store in one launch: some heads of one token a program.

Roundings stand where the single operations have them: after the norm, and after the rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require, require_index
from coserve.kernels.norm_rope_store import CacheSlots, HeadNorms
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.kv_store import check_caches
from coserve.kernels.triton.rope import check_tables
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    qkv = torch.randn(64, 48, 128, device=device, dtype=torch.bfloat16)
    tables = torch.randn(2, 512, 64, device=device)
    places = torch.arange(64, device=device)
    norm = torch.ones(128, device=device, dtype=torch.bfloat16)
    caches = torch.empty(2, 64, 16, 8, 128, device=device, dtype=torch.bfloat16)
    cache = CacheSlots(caches[0], caches[1], places)
    norms = HeadNorms(norm, norm, 1e-6)
    return lambda: norm_rope_store(qkv, 32, places, tables[0], tables[1], norms, cache)


SETTINGS = ({"HEADS": h, "num_warps": w, "num_stages": 1} for h in (4, 8, 16) for w in (2, 4))
TUNED = Tuned("norm_rope_store", {"HEADS": 8, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def _weights(q_weight, k_weight, is_q, column, inside):
    q = tl.load(q_weight + column, inside, 0.0).to(tl.float32)
    k = tl.load(k_weight + column, inside, 0.0).to(tl.float32)
    return tl.where(is_q, q, k)


@triton.jit
def _normed(x, r, w, dtype: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        y = x * r * w
    else:
        y = (x * r).to(dtype).to(tl.float32) * w
    return y.to(dtype).to(tl.float32)


@triton.jit
def norm_rope_store_kernel(
    qkv, out, out_stride, positions, cos, sin, q_weight, k_weight, eps, k_cache, k_cache_stride,
    v_cache, v_cache_stride, slots, stored, heads, kv_heads, block_size, half,
    D: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, NORMS: tl.constexpr, WIDE: tl.constexpr,
    STORES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token of qkv [T, heads + 2 kv_heads, D]: q and k, normed with NORMS and turned by
    fp32 cos and sin [P, half], to `out`; with STORES k and v of the first `stored` tokens to the cache."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_q, is_v = head < heads, head >= heads + kv_heads
    real = head < heads + 2 * kv_heads
    dtype: tl.constexpr = qkv.dtype.element_ty
    begin = qkv + (token * (heads + 2 * kv_heads) + head) * D
    goal = out + token * out_stride + head * D
    column = tl.arange(0, HALF)[None, :]
    turns = column < half
    inside = real & turns
    x1 = tl.load(begin + column, inside, 0.0).to(tl.float32)
    x2 = tl.load(begin + half + column, inside, 0.0).to(tl.float32)
    if REST:
        other = 2 * half + tl.arange(0, REST)[None, :]
        stays = real & (other < D)
        x3 = tl.load(begin + other, stays, 0.0).to(tl.float32)
    tl.debug_barrier()  # small tiles are held by several threads each: all read before one writes
    y1, y2 = x1, x2
    if NORMS:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if REST:
            squares += tl.sum(x3 * x3, 1)
        r = tl.rsqrt(squares / D + eps)[:, None]
        y1 = _normed(y1, r, _weights(q_weight, k_weight, is_q, column, turns), dtype, WIDE)
        y2 = _normed(y2, r, _weights(q_weight, k_weight, is_q, half + column, turns), dtype, WIDE)
        if REST:
            w3 = _weights(q_weight, k_weight, is_q, other, other < D)
            x3 = tl.where(is_v, x3, _normed(x3, r, w3, dtype, WIDE))
            tl.store(goal + other, x3.to(dtype), stays & (head < heads + kv_heads))
    angle = tl.load(positions + token) * half + column
    c = tl.load(cos + angle, turns, 0.0)
    s = tl.load(sin + angle, turns, 0.0)
    z1 = tl.where(is_v, x1, y1 * c - y2 * s).to(dtype)
    z2 = tl.where(is_v, x2, y2 * c + y1 * s).to(dtype)
    changed = inside & (head < heads + kv_heads)
    tl.store(goal + column, z1, changed)
    tl.store(goal + half + column, z2, changed)
    if STORES:
        slot = tl.load(slots + token, token < stored, -1)
        if slot >= 0:
            place = slot % block_size * kv_heads
            key = k_cache + slot // block_size * k_cache_stride + (place + head - heads) * D
            value = v_cache + slot // block_size * v_cache_stride + (place + head - heads - kv_heads) * D
            is_k = (head >= heads) & (head < heads + kv_heads)
            tl.store(key + column, z1, inside & is_k)
            tl.store(key + half + column, z2, inside & is_k)
            tl.store(value + column, z1, inside & is_v)
            tl.store(value + half + column, z2, inside & is_v)
            if REST:
                tl.store(key + other, x3.to(dtype), stays & is_k)
                tl.store(value + other, x3.to(dtype), stays & is_v)


def norm_rope_store(
    qkv_TMD: torch.Tensor,
    heads: int,
    positions_T: torch.Tensor,
    cos_PD2: torch.Tensor,
    sin_PD2: torch.Tensor,
    norms: HeadNorms | None,
    cache: CacheSlots | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the public function. Norms are each head's own, of [D]."""
    T, M, D = qkv_TMD.shape
    kv_heads = (M - heads) // 2
    require_dense(qkv=qkv_TMD)
    out_TMD = qkv_TMD if norms is None else qkv_TMD.new_empty(T, heads + kv_heads, D)
    q_TND, k_TND = out_TMD[:, :heads], out_TMD[:, heads : heads + kv_heads]
    v_TND = qkv_TMD[:, heads + kv_heads :]
    check_tables(qkv_TMD, positions_T, cos_PD2, sin_PD2)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    if norms is not None:
        for weight in (norms.q_weight, norms.k_weight):
            fits = weight.dtype in (qkv_TMD.dtype, torch.float32) and weight.shape == (D,)
            require(
                fits and weight.is_contiguous(), f"a norm's weight is {weight.dtype} {tuple(weight.shape)}"
            )
    k_cache, v_cache, slots = cache or (None, None, None)
    if cache is not None:
        check_caches(k_TND, v_TND, cache.k_cache_BSND, cache.v_cache_BSND)
        require_index(torch.int64, qkv_TMD.device, slots=cache.slots_T)
        require(len(cache.slots_T) <= T, f"{len(cache.slots_T)} slots for {T} tokens")
    if T:
        half, settings = cos_PD2.shape[1], TUNED.on(qkv_TMD.device)
        norm_rope_store_kernel[(T, cdiv(M, settings["HEADS"]))](
            qkv_TMD,
            out_TMD,
            out_TMD.stride(0),
            positions_T,
            cos_PD2,
            sin_PD2,
            q_weight,
            k_weight,
            eps,
            k_cache,
            0 if k_cache is None else k_cache.stride(0),
            v_cache,
            0 if v_cache is None else v_cache.stride(0),
            slots,
            0 if slots is None else len(slots),
            heads,
            kv_heads,
            0 if k_cache is None else k_cache.shape[1],
            half,
            D=D,
            HALF=next_power_of_2(half),
            REST=next_power_of_2(D - 2 * half) if D > 2 * half else 0,
            NORMS=norms is not None,
            WIDE=norms is not None and norms.q_weight.dtype != qkv_TMD.dtype,
            STORES=cache is not None,
            **settings,
        )
    return q_TND, k_TND, v_TND


def _cases() -> list[AotCase]:
    cases = []
    for dtype, weight in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"), ("bf16", None)):
        x = f"*{dtype}:16"
        signature = {
            "qkv": x,
            "out": x,
            "out_stride": "i32:16",
            "positions": "*i64:16",
            "cos": "*fp32:16",
            "sin": "*fp32:16",
            "eps": "fp32",
        }
        signature |= {"k_cache": x, "v_cache": x, "slots": "*i64:16"}
        signature |= {"k_cache_stride": "i32:16", "v_cache_stride": "i32:16", "half": "i32:16"}
        signature |= {name: "i32" for name in ("stored", "heads", "kv_heads", "block_size")}
        shape = {"D": 128, "HALF": 64, "REST": 0, "STORES": True, "WIDE": weight not in (dtype, None)}
        if weight is None:
            shape |= {"NORMS": False, "q_weight": None, "k_weight": None}
        else:
            signature |= {"q_weight": f"*{weight}:16", "k_weight": f"*{weight}:16"}
            shape |= {"NORMS": True}
        cases.append(AotCase(norm_rope_store_kernel, signature, shape, TUNED))
    return cases


AOT_CASES = _cases()
