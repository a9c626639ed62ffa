"""Norm and activation with the shrink of the LoRA behind them, against the operations one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.kernels.lora import LoraGroup, LoraModule, LoraSegments, lora_forward_
from coserve.kernels.rms_norm import add_rms_norm, rms_norm
from coserve.kernels.swiglu import swiglu
from coserve.kernels.triton import lora_fused as file
from coserve.kernels.triton import lora_shrink as shrink_file
from coserve.kernels.triton.lora import lora_expand_
from tests.kernels.oracle import error, ints
from tests.triton.oracle import DTYPES
from tests.triton.test_lora import dropout

POOL, T, K, WIDTHS = 120, 24, 150, (20, 9, 33)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (file, shrink_file):
        monkeypatch.setattr(module, "PART", 64)
    yield


def group(dtype: torch.dtype, modules: int) -> LoraGroup:
    return LoraGroup(
        [
            LoraModule(
                (torch.randn(POOL, K) / K**0.5).to(dtype),
                torch.randn(POOL, N).to(dtype),
                sum(WIDTHS[:m]),
                m,
                7 * m,
            )
            for m, N in enumerate(WIDTHS[:modules])
        ]
    )


def tables() -> tuple[LoraSegments, torch.Tensor]:
    """Tokens before, between and behind the segments are the base's; the last two entries are padding."""
    rows = torch.randperm(POOL)[:75].int()
    segments = LoraSegments(ints(2, 3, 21, 0, 0), ints(3, 20, 22, 0, 0), ints(0, 5, 69, 0, 0), rows)
    return segments, ints(5, 64, 3, 0, 0, 0, 16, 6, 0, 0, 2, 0, 0, 0, 0).reshape(3, 5)


def expanded(own: LoraGroup, h: torch.Tensor, *how) -> torch.Tensor:  # type: ignore[no-untyped-def]
    segments, ranks, drop = how
    y = torch.zeros(T, own.width).to(own.dtype)
    for m, module in enumerate(own.modules):
        lora_expand_(y[:, module.columns], h[m], module.b_RN, segments, ranks[module.line], drop)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    """Alone in fp32; after an addition, with dropout, in fp16."""
    adds = dtype == torch.float16
    how = (*tables(), dropout(T, 0.2, 0.0, 0.5, 0.0, 0.0) if adds else None)
    own, w = group(dtype, 3), torch.randn(K, dtype=dtype)
    x, residual = torch.randn(T, K).to(dtype), torch.randn(T, K).to(dtype)
    want, total = add_rms_norm(x, residual, w, 1e-6) if adds else (rms_norm(x, w, 1e-6), x)
    y, got, h = file.rms_norm_shrink(x, residual if adds else None, w, 1e-6, own, *how)
    assert torch.equal(got, total)
    assert error(y, want.double()) < (1e-6 if dtype == torch.float32 else 2e-3)
    lora = lora_forward_(torch.zeros(T, own.width).to(dtype), y, own, *how)
    assert torch.equal(expanded(own, h, *how), lora)


@pytest.mark.parametrize(("act", "many"), [("silu", False), ("gelu_tanh", True)])
def test_activation(act: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    how, own, gate_up = (*tables(), None), group(torch.float32, 1), torch.randn(T, 2 * K)
    want = swiglu(gate_up, act)  # type: ignore[arg-type]
    lora = lora_forward_(torch.zeros(T, own.width), want, own, *how)
    if many:
        monkeypatch.setattr(file, "MANY_PROGRAMS", 0)
    y, h = file.swiglu_shrink(gate_up, act, own, *how)
    assert torch.equal(y, want)
    assert len(h[0]) == (1 if many else 3)
    assert torch.equal(expanded(own, h, *how), lora)


def test_what_does_not_fit_is_refused() -> None:
    (segments, ranks), own, w = tables(), group(torch.float32, 2), torch.ones(K)
    x = torch.randn(T, K)
    for bad, match in (
        ((x, None, w[1:], 1e-6, own, segments, ranks), "w has shape"),
        ((torch.randn(K, T).t(), None, w, 1e-6, own, segments, ranks), "not contiguous"),
        ((x.half(), None, w.half(), 1e-6, own, segments, ranks), "a and b are"),
        ((x, x[1:], w, 1e-6, own, segments, ranks), "residual"),
        ((x, None, w, 1e-6, own, segments, ranks[:1]), "lines"),
    ):
        with pytest.raises(ValueError, match=match):
            file.rms_norm_shrink(*bad)
    with pytest.raises(ValueError, match="even number"):
        file.swiglu_shrink(torch.randn(T, 2 * K + 1), "silu", own, segments, ranks)
    assert file.rms_norm_shrink(x[:0], None, w, 1e-6, own, segments, ranks)[2].shape[2] == 0
