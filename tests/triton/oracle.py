"""Comparison of an interpreted kernel with the same formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coserve.kernels.dispatch import use_backend
from tests.kernels.oracle import as_double, error

FP32_BOUND = 2e-6
DTYPES = (torch.float32, torch.float16)  # the interpreter's bf16 products are wrong


def check(
    run: Callable[..., tuple[torch.Tensor, ...]],
    *args: object,
    bound: float = FP32_BOUND,
    fp16_slack: float = 1e-6,
) -> None:
    """`run(*args)` on Triton against float64: fp32 within `bound`, fp16 within twice the reference's."""
    wants = run(*as_double(args))
    copies = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
    with use_backend("reference"):
        references = run(*copies)
    low = next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)) == torch.float16
    for got, reference, want in zip(run(*args), references, wants, strict=True):
        limit = 2 * error(reference, want) + fp16_slack if low else bound
        assert error(got, want) <= limit
