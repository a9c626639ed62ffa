"""Root-mean-square norm over the last dimension, its sum-then-norm form, and its backward.

    y = cast(x * r) * w,   r = 1 / sqrt(mean(x^2) + eps)            (Zhang & Sennrich 2019, Llama's rounding)
    dx = r * (g - x * r * mean(g * x * r)),   g = dy * w            (w is frozen and gets no gradient)

Statistics are fp32. The last dimension may be H or, for q and k norms, D.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import wide


def rms_norm(x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of every row of `x` [..., H]; fp32 or bf16, result in x's dtype."""
    return _rms_norm_reference(x_TH, w_H, eps)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, w_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm(x + residual), x + residual)`, the sum rounded to the dtype before it is normed."""
    total = x_TH + residual_TH
    return _rms_norm_reference(total, w_H, eps), total


def rms_norm_backward(dy_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient w.r.t. `x` [..., H], in dy's dtype."""
    return _rms_norm_backward_reference(dy_TH, x_TH, w_H, eps)


def _rms_norm_reference(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    xf = wide(x)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * r).to(x.dtype) * w


def _rms_norm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, eps: float
) -> torch.Tensor:
    xf, g = wide(x), wide(dy) * wide(w)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    normed = xf * r
    return (r * (g - normed * (g * normed).mean(-1, keepdim=True))).to(dy.dtype)
