"""AdamW in one pass over the flat buffers (formula in coserve/kernels/adamw.py), divisions and root exact."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require_flat
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Any:
    buffers = [torch.rand(1 << 23, device=device) for _ in range(4)]
    return lambda: adamw_(*buffers, 1e-3, 0.9, 0.999, 1e-8, 1.0, 0.5, 1.0)


CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps, "num_stages": 2}
    for block in (512, 1024, 2048)
    for warps in (2, 4, 8)
)
TUNED = Tuned("adamw", {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}, CANDIDATES, _example)


@triton.jit
def moved(g, m, v, keep1, beta2, keep2):
    """Both moments after a gradient."""
    return m + keep1 * (g - m), beta2 * v + keep2 * (g * g)


@triton.jit
def direction(m, v, eps, root_correction):
    """m / (sqrt(v) / root_correction + eps)"""
    return tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps)


@triton.jit
def adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, count, step_size, keep1, beta2, keep2, eps, decay, root_correction,
    grad_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of `count` fp32 elements, BLOCK a program; step_size is lr over the first correction."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    m, v = moved(
        g,
        tl.load(exp_avg + at, mask=inside, other=0.0),
        tl.load(exp_avg_sq + at, mask=inside, other=0.0),
        keep1,
        beta2,
        keep2,
    )
    p = tl.load(param + at, mask=inside, other=0.0) * decay
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(param + at, p - step_size * direction(m, v, eps, root_correction), mask=inside)


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    root_correction: float,
    grad_scale: float,
) -> None:
    """Update flat fp32 `param`, `exp_avg`, `exp_avg_sq` in place."""
    require_flat(param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    count, settings = param.numel(), TUNED.on(param.device)
    if count:
        adamw_kernel[(cdiv(count, settings["BLOCK"]),)](
            param, grad, exp_avg, exp_avg_sq, count, step_size, 1 - beta1, beta2, 1 - beta2, eps, decay,
            root_correction, grad_scale, **settings,
        )  # fmt: skip


_BUFFERS = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), "*fp32:16")
_NUMBERS = dict.fromkeys(
    ("step_size", "keep1", "beta2", "keep2", "eps", "decay", "root_correction", "grad_scale"), "fp32"
)
AOT_CASES = [AotCase(adamw_kernel, {**_BUFFERS, "count": "i32", **_NUMBERS}, {}, TUNED)]
