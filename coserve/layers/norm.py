"""RMS norm with its weight (see kernels/rms_norm.py for the formulas)."""

from __future__ import annotations

import torch

from coserve.kernels.lora import ProductLora
from coserve.kernels.lora_fused import rms_norm_shrink
from coserve.kernels.rms_norm import rms_norm, rms_norm_backward


class RMSNorm:
    """Norm over the last dimension, H or a head's D."""

    def __init__(self, weight_H: torch.Tensor, eps: float) -> None:
        self.weight = weight_H
        self.eps = eps

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """norm(x), same shape and dtype."""
        return rms_norm(x_TH, self.weight, self.eps)

    def shrink_forward(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor | None, lora: ProductLora | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(norm(s), s, h) of s = x + residual, or x; h is for the linear whose adapters these are, None where
        it makes its own."""
        return rms_norm_shrink(x_TH, residual_TH, self.weight, self.eps, lora)

    def backward(self, dy_TH: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """Gradient w.r.t. the input `x` that the norm was taken of."""
        return rms_norm_backward(dy_TH, x_TH, self.weight, self.eps)
