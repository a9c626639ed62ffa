"""What every Triton kernel file needs: checks of its arguments and whether it runs in the interpreter."""

from __future__ import annotations

import torch
import triton

from coserve.kernels.dispatch import require

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, in numpy


def require_same(x: torch.Tensor, /, **others: torch.Tensor) -> None:
    """Each of `others` has x's dtype and device."""
    for name, other in others.items():
        require(
            other.dtype == x.dtype and other.device == x.device,
            f"{name} is {other.dtype} on {other.device}, expected {x.dtype} on {x.device}",
        )


def require_dense(**tensors: torch.Tensor) -> None:
    """Each tensor is contiguous."""
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name} of strides {tensor.stride()} is not contiguous")


def require_rows(**tensors: torch.Tensor) -> None:
    """Each tensor is contiguous in all but its first dimension, whose stride is free."""
    for name, tensor in tensors.items():
        inner = tensor[0] if len(tensor) else tensor
        require(inner.is_contiguous(), f"{name} of strides {tensor.stride()} is not contiguous in its rows")
