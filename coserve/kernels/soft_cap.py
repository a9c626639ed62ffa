"""Soft cap of logits in place:  x -> c * tanh(x / c)   (Gemma 2)."""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import DTYPE_CODES, native_for, require_like, triton_or_reference, wide


def soft_cap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap `x` (fp32 or bf16, contiguous, any shape) in place, rounded once, and return it; `cap` > 0."""
    native = native_for(x)
    if native is None:
        return triton_or_reference(x, _soft_cap_reference_)(x, cap)
    require_like(x, contiguous=True, x=x)
    native.soft_cap(DTYPE_CODES[x.dtype], x.data_ptr(), x.numel(), cap)
    return x


def _soft_cap_reference_(x: torch.Tensor, cap: float) -> torch.Tensor:
    return x.copy_(cap * torch.tanh(wide(x) / cap))
