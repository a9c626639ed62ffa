"""The products of --deterministic in the interpreter: against float64, and a row's bits in every batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.kernels import dispatch
from coserve.kernels.linear import PackedLinear
from coserve.kernels.triton import linear as file
from tests.kernels.oracle import INTERPRETED_DTYPES, error


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With parts of 64 inputs instead of 1024, to have several of them."""
    monkeypatch.setattr(file, "PART", 64)
    before = dispatch.batch_invariant()
    dispatch.set_batch_invariant(True)
    yield
    dispatch.set_batch_invariant(before)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (33, 40), (130, 150)])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_both_products(N: int, K: int, dtype: torch.dtype) -> None:
    linear = PackedLinear(torch.randn(N, K).to(dtype), torch.randn(N).to(dtype))
    weight, bias = linear.unpacked(), linear.bias
    assert bias is not None
    for M in (1, 5, 70):
        x, dy = torch.randn(M, K + 3).to(dtype)[:, 3:], torch.randn(M, N).to(dtype)
        for got, want in (
            (linear.forward(x), x.double() @ weight.double().t() + bias.double()),
            (linear.backward_input(dy), dy.double() @ weight.double()),
        ):
            assert got.dtype == dtype
            assert error(got, want) <= max(1.1 * error(want.to(dtype), want), 2e-6)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, and some of another number, have their parts added by a second launch; 90 rows by their own
    program, as have all when a device is full sooner."""
    linear = PackedLinear(torch.randn(70, 200).to(dtype), torch.randn(70).to(dtype))
    x, dy = torch.randn(90, 200).to(dtype), torch.randn(90, 70).to(dtype)
    y, dx = linear.forward(x), linear.backward_input(dy)
    for span in (slice(0, 1), slice(89, 90), slice(3, 20), slice(26, 90), slice(5, 70)):
        assert torch.equal(linear.forward(x[span]), y[span])
        assert torch.equal(linear.backward_input(dy[span]), dx[span])
    monkeypatch.setattr(file, "MANY_PROGRAMS", 0)
    assert torch.equal(linear.forward(x[7:9]), y[7:9])
    assert torch.equal(linear.backward_input(dy[7:9]), dx[7:9])


def test_torch_multiplies_unless_rows_must_keep_their_bits() -> None:
    linear, x = PackedLinear(torch.randn(8, 6)), torch.randn(2, 7)
    with pytest.raises(ValueError, match="x has 7 columns"):
        linear.forward(x)
    dispatch.set_batch_invariant(False)
    with pytest.raises(RuntimeError):
        linear.forward(x)


def test_no_rows_and_what_does_not_fit() -> None:
    linear = PackedLinear(torch.randn(8, 6))
    assert linear.forward(torch.empty(0, 6)).shape == (0, 8)
    assert linear.backward_input(torch.empty(0, 8)).shape == (0, 6)
    with pytest.raises(ValueError, match="contiguous in its rows"):
        linear.forward(torch.randn(6, 2).t())
    with pytest.raises(ValueError, match=r"expected torch\.float16"):
        linear.forward(torch.randn(2, 6).half())
    with pytest.raises(ValueError, match="dy has 6 columns"):
        linear.backward_input(torch.randn(2, 6))
