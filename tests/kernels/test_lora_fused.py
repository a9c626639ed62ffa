"""Norm and activation before a LoRA: the plain pair in C++, h beside y in the reference."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.dispatch import use_backend
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import (
    LoraGroup,
    LoraModule,
    LoraSegments,
    ProductLora,
    lora_expand_,
    lora_forward_,
)
from coserve.kernels.lora_fused import rms_norm_shrink, swiglu_shrink
from coserve.kernels.rms_norm import add_rms_norm, rms_norm
from coserve.kernels.swiglu import swiglu
from tests.kernels.oracle import ints

POOL, T, K, WIDTHS = 120, 24, 150, (20, 9, 33)


def product(dtype: torch.dtype, modules: int, dropout: Dropout | None = None) -> ProductLora:
    """Tokens before, between and behind the segments are the base's; the last two segments are padding."""
    made = [
        LoraModule(
            (torch.randn(POOL, K) / K**0.5).to(dtype),
            torch.randn(POOL, N).to(dtype),
            sum(WIDTHS[:m]),
            m,
            7 * m,
        )
        for m, N in enumerate(WIDTHS[:modules])
    ]
    rows = torch.randperm(POOL)[:75].int()
    segments = LoraSegments(ints(2, 3, 21, 0, 0), ints(3, 20, 22, 0, 0), ints(0, 5, 69, 0, 0), rows)
    ranks = ints(5, 64, 3, 0, 0, 0, 16, 6, 0, 0, 2, 0, 0, 0, 0).reshape(3, 5)
    return ProductLora(LoraGroup(made), segments, ranks, dropout)


def added(y: torch.Tensor, h: torch.Tensor | None, lora: ProductLora) -> torch.Tensor:
    """What the adapters add to a product of `y`, by the second half alone where there is an h."""
    out = torch.zeros(T, lora.group.width).to(y.dtype)
    return lora_forward_(out, y, *lora) if h is None else lora_expand_(out, h, *lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_it_is_the_plain_pair(isa: str, dtype: torch.dtype) -> None:
    lora, w = product(dtype, 3), torch.randn(K).to(dtype)
    x, residual, gate_up = (torch.randn(T, n).to(dtype) for n in (K, K, 2 * K))
    y, total, h = rms_norm_shrink(x, residual, w, 1e-6, lora)
    assert h is None and all(
        torch.equal(a, b) for a, b in zip((y, total), add_rms_norm(x, residual, w, 1e-6), strict=True)
    )
    y, total, h = rms_norm_shrink(x, None, w, 1e-6, lora)
    assert h is None and total is x and torch.equal(y, rms_norm(x, w, 1e-6))
    y, h = swiglu_shrink(gate_up, "gelu_tanh", lora)
    assert h is None and torch.equal(y, swiglu(gate_up, "gelu_tanh"))


@pytest.mark.parametrize("drops", [False, True])
def test_the_halves_of_the_reference_are_its_whole(drops: bool) -> None:
    keys, rates = torch.arange(T), torch.tensor([0.2, 0.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    lora, w = product(torch.float32, 3, Dropout(keys, rates) if drops else None), torch.randn(K)
    x, residual, gate_up = (torch.randn(T, n) for n in (K, K, 2 * K))
    with use_backend("reference"):
        y, total, h = rms_norm_shrink(x, residual, w, 1e-6, lora)
        assert h is not None and torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(total, w, 1e-6)) and torch.equal(
            added(y, h, lora), added(y, None, lora)
        )
        y, h = swiglu_shrink(gate_up, "silu", lora)
        assert h is not None and torch.equal(y, swiglu(gate_up))
        assert torch.equal(added(y, h, lora), added(y, None, lora))
        assert (
            rms_norm_shrink(x, None, w, 1e-6, None)[2] is None
            and swiglu_shrink(gate_up, "silu", None)[1] is None
        )
