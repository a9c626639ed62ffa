"""Norm and activation with the shrink of the LoRA behind them, against the operations one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.kernels.dispatch import set_batch_invariant
from coserve.kernels.lora_fused import rms_norm_shrink, swiglu_shrink
from coserve.kernels.rms_norm import add_rms_norm, rms_norm
from coserve.kernels.swiglu import Activation, swiglu
from coserve.kernels.triton import lora_fused as file
from coserve.kernels.triton import lora_shrink as shrink_file
from tests.kernels.oracle import INTERPRETED_DTYPES, error
from tests.kernels.test_lora_fused import K, T, added, product
from tests.triton.test_lora import dropout


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (file, shrink_file):
        monkeypatch.setattr(module, "PART", 64)
    yield


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in fp32, in pieces; after an addition, with dropout, in fp16."""
    adds = dtype == torch.float16
    if not adds:
        monkeypatch.setattr(file, "LANES", 32)
    lora = product(dtype, 3, dropout(T, 0.2, 0.0, 0.5, 0.0, 0.0) if adds else None)
    w, x, residual = (torch.randn(size).to(dtype) for size in (K, (T, K), (T, K)))
    want, total = add_rms_norm(x, residual, w, 1e-6) if adds else (rms_norm(x, w, 1e-6), x)
    y, got, h = rms_norm_shrink(x, residual if adds else None, w, 1e-6, lora)
    assert h is not None and torch.equal(got, total)
    assert error(y, want.double()) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(added(y, h, lora), added(y, None, lora))


@pytest.mark.parametrize(("act", "many"), [("silu", False), ("gelu_tanh", True)])
def test_activation(act: Activation, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, gate_up = product(torch.float32, 1), torch.randn(T, 2 * K)
    want = swiglu(gate_up, act)
    plain = added(want, None, lora)
    if many:
        monkeypatch.setattr(file, "MANY_PROGRAMS", 0)
    y, h = swiglu_shrink(gate_up, act, lora)
    assert h is not None and torch.equal(y, want)
    assert len(h[0]) == (1 if many else 3)
    assert torch.equal(added(y, h, lora), plain)


def test_deterministic_norms_have_the_bits_of_rows_without_adapters() -> None:
    lora, w, x = product(torch.float32, 3), torch.randn(K), torch.randn(T, K)
    set_batch_invariant(True)
    try:
        y, _, h = rms_norm_shrink(x, None, w, 1e-6, lora)
        alone, _, _ = rms_norm_shrink(x[:1], None, w, 1e-6, None)
    finally:
        set_batch_invariant(False)
    assert h is None and torch.equal(y[:1], alone) and torch.equal(y, rms_norm(x, w, 1e-6))


def test_what_does_not_fit_is_refused() -> None:
    lora, w, x = product(torch.float32, 2), torch.ones(K), torch.randn(T, K)
    for bad, match in (
        ((x, None, w[1:], 1e-6, lora), "w has shape"),
        ((torch.randn(K, T).t(), None, w, 1e-6, lora), "not contiguous"),
        ((x.half(), None, w.half(), 1e-6, lora), "a and b are"),
        ((x, x[1:], w, 1e-6, lora), "residual"),
        ((x, None, w, 1e-6, lora._replace(ranks_MS=lora.ranks_MS[:1])), "lines"),
    ):
        with pytest.raises(ValueError, match=match):
            rms_norm_shrink(*bad)
    with pytest.raises(ValueError, match="even number"):
        swiglu_shrink(torch.randn(T, 2 * K + 1), "silu", lora)
    h = rms_norm_shrink(x[:0], None, w, 1e-6, lora)[2]
    assert h is not None and h.shape[2] == 0
    for wrong, match in ((torch.zeros(2, 1, T, 16), "h is"), (torch.zeros(2, 1, T, 80).half(), "h is")):
        with pytest.raises(ValueError, match=match):
            added(x, wrong, lora)
