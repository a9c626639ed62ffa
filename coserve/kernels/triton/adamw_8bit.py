"""AdamW whose moments lie in blocks of 256 codes (formula in coserve/kernels/adamw_8bit.py).

One program a block. A code is the number of the 255 ascending edges below the value, found by bisection.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.adamw_8bit import BLOCK, QuantizedMoments, dynamic_map, map_edges
from coserve.kernels.dispatch import require_flat
from coserve.kernels.triton.adamw import direction, moved
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import require_dense
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Any:
    param, grad = (torch.rand(1 << 22, device=device) for _ in range(2))
    moments = QuantizedMoments.zeros([(0, 1 << 22, 1.0)], device)
    return lambda: adamw_8bit_(param, grad, moments, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.5, 1.0)


TUNED = Tuned(
    "adamw_8bit",
    {"num_warps": 2, "num_stages": 2},
    tuple({"num_warps": warps, "num_stages": 2} for warps in (1, 2, 4, 8)),
    _example,
)


@triton.jit
def quantized(values, edges):
    """(codes, absmax) of a block's values."""
    scale = tl.max(tl.abs(values), 0)
    unit = tl.div_rn(values, tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(values))
    code = tl.zeros_like(values).to(tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(tl.load(edges + code + ((128 >> bit) - 1)) < unit, 128 >> bit, 0)
    return code.to(tl.uint8), scale


@triton.jit
def adamw_8bit_kernel(
    param, grad, starts, lengths, ratio, m_codes, v_codes, m_scale, v_scale,
    signed_map, signed_edges, unsigned_map, unsigned_edges,
    step_size, keep1, beta2, keep2, eps, decay, root_correction, grad_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of one block: int64 `starts`, `lengths` [blocks] say where it lies in the fp32 param and grad,
    `ratio` fp32 how its rate compares with lr; codes uint8 [blocks, BLOCK], scales fp32 [blocks]."""
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    real = within < tl.load(lengths + block)
    at = tl.load(starts + block) + within
    coded = block.to(tl.int64) * BLOCK + within
    g = tl.load(grad + at, mask=real, other=0.0) * grad_scale
    m = tl.load(signed_map + tl.load(m_codes + coded).to(tl.int32)) * tl.load(m_scale + block)
    v = tl.load(unsigned_map + tl.load(v_codes + coded).to(tl.int32)) * tl.load(v_scale + block)
    m, v = moved(g, tl.where(real, m, 0.0), tl.where(real, v, 0.0), keep1, beta2, keep2)
    factor = tl.load(ratio + block)
    p = tl.load(param + at, mask=real, other=0.0) * (1.0 - decay * factor)
    tl.store(param + at, p - step_size * factor * direction(m, v, eps, root_correction), mask=real)
    code, scale = quantized(m, signed_edges)
    tl.store(m_codes + coded, code)
    tl.store(m_scale + block, scale)
    code, scale = quantized(v, unsigned_edges)
    tl.store(v_codes + coded, code)
    tl.store(v_scale + block, scale)


@cache
def _maps(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(table(signed).to(device) for signed in (True, False) for table in (dynamic_map, map_edges))


def adamw_8bit_(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: QuantizedMoments,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    root_correction: float,
    grad_scale: float,
) -> None:
    """Update `moments` and, at their blocks, flat fp32 `param` in place; `decay` is lr * weight_decay."""
    require_flat(param, grad=grad)
    tensors = vars(moments)
    require_dense(**tensors)
    blocks = len(moments.starts_B)
    if blocks:
        adamw_8bit_kernel[(blocks,)](
            param, grad, *tensors.values(), *_maps(param.device),
            step_size, 1 - beta1, beta2, 1 - beta2, eps, decay, root_correction, grad_scale,
            BLOCK=BLOCK, **TUNED.on(param.device),
        )  # fmt: skip


_TYPES = {"starts": "*i64", "lengths": "*i64", "m_codes": "*u8:16", "v_codes": "*u8:16"}
_FLOATS = ("step_size", "keep1", "beta2", "keep2", "eps", "decay", "root_correction", "grad_scale")
_TYPES |= {name: "*fp32" for name in adamw_8bit_kernel.arg_names[:-1] if name not in (*_TYPES, *_FLOATS)}
AOT_CASES = [AotCase(adamw_8bit_kernel, _TYPES | dict.fromkeys(_FLOATS, "fp32"), {"BLOCK": BLOCK}, TUNED)]
