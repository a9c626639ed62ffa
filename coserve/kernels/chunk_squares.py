"""Sums of squares of a flat tensor by chunks, in float64: the first half of a gradient's norm.

    s[c] = sum of x[i]^2 over chunk c of 16384 elements

A chunk is summed by one thread or program in one order, so the norm doesn't depend on how many there are; the
second half is an exact sum of few numbers on the host, which needs the norm anyway.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import native_for, require, triton_or_reference

CHUNK = 16384


def chunk_squares(x: torch.Tensor) -> torch.Tensor:
    """float64 [chunks] of flat fp32 `x`, at least one element."""
    require(x.dim() == 1 and x.is_contiguous() and x.dtype == torch.float32, "expected a flat fp32 tensor")
    native = native_for(x)
    if native is None:
        return triton_or_reference(x, _chunk_squares_reference)(x)
    sums = torch.empty(-(-len(x) // CHUNK), dtype=torch.float64)
    native.chunk_squares(x.data_ptr(), len(x), sums.data_ptr())
    return sums


def _chunk_squares_reference(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([chunk.double().square().sum() for chunk in x.split(CHUNK)])
