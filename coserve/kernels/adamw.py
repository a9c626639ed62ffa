"""AdamW on flat fp32 buffers (Loshchilov & Hutter 2019; torch.optim.AdamW's order of operations).

g = grad * grad_scale
p *= 1 - lr * weight_decay
m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2
p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import native_for, require_flat, triton_or_reference


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Update flat fp32 `param`, `exp_avg`, `exp_avg_sq` in place; `step` counts from 1; `grad` is kept.

    `grad_scale` multiplies the gradient first (clipping).
    """
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** 0.5
    decay = 1 - lr * weight_decay
    native = native_for(param)
    if native is not None:
        require_flat(param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        native.adamw(
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            param.numel(),
            step_size,
            beta1,
            beta2,
            eps,
            decay,
            root_correction,
            grad_scale,
        )
        return
    run = triton_or_reference(param, _adamw_reference_)
    run(param, grad, exp_avg, exp_avg_sq, step_size, beta1, beta2, eps, decay, root_correction, grad_scale)


def _adamw_reference_(
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
    g = grad * grad_scale
    param.mul_(decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / root_correction).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-step_size)
