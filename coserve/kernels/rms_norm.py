"""Root-mean-square norm over the last dimension, its sum-then-norm form, and its backward.

    y = cast(x * r) * w,   r = 1 / sqrt(mean(x^2) + eps)            (Zhang & Sennrich 2019, Llama's rounding)
    y = cast(x * r * w)                                             (w fp32 beside bf16: Gemma's and OLMo's)
    dx = r * (g - x * r * mean(g * x * r)),   g = dy * w            (w is frozen and gets no gradient)

Statistics are fp32. The last dimension may be H or, for q and k norms, D.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_like,
    triton_or_reference,
    wide,
)


def rms_norm(x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of every row of `x` [..., H]; fp32 or bf16, result in x's dtype."""
    native = native_for(x_TH)
    if native is None:
        return triton_or_reference(x_TH, _rms_norm_reference)(x_TH, w_H, eps)
    H = w_H.numel()
    contiguous = x_TH.is_contiguous()
    if w_H.dtype is not x_TH.dtype or x_TH.shape[-1] != H or not (w_H.is_contiguous() and contiguous):
        _check(x_TH, w_H)
    y_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype)
    rows = x_TH.numel() // H
    x_stride, inner = (H, 1) if contiguous or not rows else (x_TH.stride(0), rows // len(x_TH))
    native.rms_norm(
        _code(x_TH, w_H),
        x_TH.data_ptr(),
        x_stride,
        inner,
        0,
        w_H.data_ptr(),
        rows,
        H,
        eps,
        0,
        y_TH.data_ptr(),
    )
    return y_TH


def _code(x: torch.Tensor, w: torch.Tensor) -> int:
    """csrc's number for the dtypes: 0 fp32, 1 bf16, 2 bf16 with fp32 weights."""
    return DTYPE_CODES[x.dtype] + (w.dtype is not x.dtype)


def _check(x: torch.Tensor, w: torch.Tensor) -> None:
    require_like(x, x=x)
    if w.dtype != torch.float32:
        require_like(x, w=w)
    require(w.is_contiguous() and w.is_cpu, "w must be contiguous on the CPU")
    require(w.shape == x.shape[-1:], f"w has shape {tuple(w.shape)}, expected ({x.shape[-1]},)")


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, w_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm(x + residual), x + residual)`, the sum rounded to the dtype before it is normed."""
    native = native_for(x_TH)
    if native is None:
        return triton_or_reference(x_TH, _add_rms_norm_reference)(x_TH, residual_TH, w_H, eps)
    H = w_H.numel()
    whole = x_TH.is_contiguous() and residual_TH.is_contiguous() and w_H.is_contiguous()
    dtype, shape = x_TH.dtype, x_TH.shape
    alike = w_H.dtype is dtype and residual_TH.dtype is dtype and residual_TH.shape == shape
    if not (whole and alike and shape[-1] == H):
        _check(x_TH, w_H)
        require_like(x_TH, contiguous=True, x=x_TH, residual=residual_TH)
        require(residual_TH.shape == shape, f"residual {tuple(residual_TH.shape)}, x {tuple(shape)}")
    y_TH, total = torch.empty_like(x_TH), torch.empty_like(x_TH)
    native.rms_norm(
        _code(x_TH, w_H),
        x_TH.data_ptr(),
        H,
        1,
        residual_TH.data_ptr(),
        w_H.data_ptr(),
        x_TH.numel() // H,
        H,
        eps,
        total.data_ptr(),
        y_TH.data_ptr(),
    )
    return y_TH, total


def rms_norm_backward(dy_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient w.r.t. `x` [..., H], in dy's dtype."""
    native = native_for(dy_TH)
    if native is None:
        return triton_or_reference(dy_TH, _rms_norm_backward_reference)(dy_TH, x_TH, w_H, eps)
    H = x_TH.shape[-1]
    require_like(dy_TH, contiguous=True, dy=dy_TH, x=x_TH)
    require(dy_TH.shape == x_TH.shape, f"dy {tuple(dy_TH.shape)}, x {tuple(x_TH.shape)}")
    _check(x_TH, w_H)
    dx_TH = torch.empty_like(dy_TH)
    native.rms_norm_backward(
        _code(dy_TH, w_H),
        dy_TH.data_ptr(),
        x_TH.data_ptr(),
        w_H.data_ptr(),
        x_TH.numel() // H,
        H,
        eps,
        dx_TH.data_ptr(),
    )
    return dx_TH


def _rms_norm_reference(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    xf = wide(x)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * r).to(x.dtype) * w if w.dtype == x.dtype else (xf * r * w).to(x.dtype)


def _add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _rms_norm_reference(total, w, eps), total


def _rms_norm_backward_reference(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, eps: float
) -> torch.Tensor:
    xf, g = wide(x), wide(dy) * wide(w)
    r = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    normed = xf * r
    return (r * (g - normed * (g * normed).mean(-1, keepdim=True))).to(dy.dtype)
