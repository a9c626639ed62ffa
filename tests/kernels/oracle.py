"""Comparison of a kernel, in C++ or in Triton's interpreter, with the same formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coserve.kernels.dispatch import use_backend
from coserve.kernels.lora import LoraGroup, LoraModule, ModuleGradient, lora_backward, lora_forward_

FP32_BOUND = 2e-6
DTYPES = (torch.float32, torch.bfloat16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # the interpreter's bf16 products are wrong


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value of the float64 `want` (at least 0.1); NaN is infinite."""
    if want.numel() == 0:
        return 0.0
    scale = max(float(want.abs().max()), 0.1)
    difference = (got.double() - want).abs().nan_to_num(nan=float("inf"))
    return float(difference.max()) / scale


def as_double(args: tuple) -> tuple:
    """Floating tensors of `args` as fresh float64 copies, the rest unchanged."""
    return tuple(
        arg.double().clone() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def check(
    run: Callable[..., tuple[torch.Tensor, ...]],
    *args: object,
    bound: float = FP32_BOUND,
    low_slack: float = 1e-6,
    peer: Callable[..., tuple[torch.Tensor, ...]] | None = None,
) -> None:
    """`run(*args)` against float64: fp32 within `bound`, 16 bits within `low_slack` and twice the error of
    the reference, or of `peer`, which does the same in torch."""
    wants = run(*as_double(args))
    copies = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
    with use_backend("reference"):
        references = (peer or run)(*copies)
    for got, reference, want in zip(run(*args), references, wants, strict=True):
        low = next(a.dtype for a in args if isinstance(a, torch.Tensor)).itemsize == 2
        limit = 2 * error(reference, want) + low_slack if low else bound
        assert error(got, want) <= limit


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lora_forward_one_(y, x, a, b, segments, ranks_S, dropout=None):  # type: ignore[no-untyped-def]
    """The LoRA forward of a product of one module."""
    group = LoraGroup([LoraModule(a, b, salt=dropout.salt if dropout else 0)])
    return lora_forward_(y, x, group, segments, ranks_S[None], dropout)


def lora_backward_one(dy, x, a, b, rows, dx, da, db, offset, dropout=None):  # type: ignore[no-untyped-def]
    """The LoRA backward of a product of one module."""
    lora_backward(dy, x, [ModuleGradient(a, b, rows, da, db, dropout)], dx, offset)
