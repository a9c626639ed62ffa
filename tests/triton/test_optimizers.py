"""The optimizers in the interpreter, against torch's and their references."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import BLOCK, QuantizedMoments, adamw_8bit_
from coserve.kernels.chunk_squares import CHUNK, chunk_squares
from coserve.kernels.dispatch import use_backend
from coserve.kernels.sgd import sgd_
from tests.kernels.optimizer_cases import (
    ADAM,
    SPANS,
    check_8bit,
    check_8bit_only_decays,
    check_adamw,
    check_sgd,
)


@pytest.mark.parametrize("size", (1, 37, 2100))
def test_adamw_matches_torch(size: int) -> None:
    check_adamw(size, 4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_matches_torch(momentum: float, weight_decay: float) -> None:
    check_sgd(1300, 3, momentum, weight_decay)


@pytest.mark.parametrize("spans", SPANS)
def test_8bit_matches_its_reference(spans: list[tuple[int, int, float]]) -> None:
    check_8bit(spans, 6)


def test_8bit_of_a_zero_gradient_only_decays() -> None:
    check_8bit_only_decays()


def test_nothing_to_do_and_what_does_not_fit() -> None:
    none, x = torch.empty(0), torch.zeros(2 * BLOCK)
    adamw_(none, none, none, none, step=1, **ADAM)
    sgd_(none, none, None, lr=1.0, momentum=0.0, weight_decay=0.0)
    adamw_8bit_(none, none, QuantizedMoments.zeros([]), step=1, **ADAM)
    with pytest.raises(ValueError, match="exp_avg must"):
        adamw_(x, x, x.half(), x, step=1, **ADAM)
    with pytest.raises(ValueError, match="momentum_buffer must"):
        sgd_(x, x, x[::2], lr=1.0, momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match="grad must"):
        adamw_8bit_(x, x[::2], QuantizedMoments.zeros([(0, 4, 1.0)]), step=1, **ADAM)


@pytest.mark.parametrize("size", [1, CHUNK, 2 * CHUNK + 77])
def test_chunk_squares(size: int) -> None:
    x = torch.randn(size)
    got = chunk_squares(x)
    with use_backend("reference"):
        want = chunk_squares(x)
    assert got.dtype == torch.float64 and got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="flat fp32"):
        chunk_squares(torch.randn(4, 2).t())
