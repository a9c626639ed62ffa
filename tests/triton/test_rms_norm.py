"""RMS norm in the interpreter: against float64, by rows, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from tests.kernels.oracle import INTERPRETED_DTYPES, check

SHAPES = ((1, 7), (3, 32), (5, 96), (2, 1500))


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, dy = (torch.randn(shape, dtype=dtype) for _ in range(3))
    for w in (torch.randn(shape[1], dtype=dtype), torch.randn(shape[1])):
        check(lambda x, w: (rms_norm(x, w, 1e-6),), x, w)
        check(lambda x, residual, w: add_rms_norm(x, residual, w, 1e-6), x, residual, w)
        check(lambda dy, x, w: (rms_norm_backward(dy, x, w, 1e-6),), dy, x, w)


def test_heads_inside_a_merged_projection() -> None:
    merged, w = torch.randn(5, 6, 16), torch.randn(16)
    whole = rms_norm(merged[:, 1:4].contiguous(), w, 1e-6)
    assert torch.equal(rms_norm(merged[:, 1:4], w, 1e-6), whole)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, w = torch.randn(70, 48), torch.randn(48)
    whole = rms_norm(x, w, 1e-6)
    assert torch.equal(torch.cat([rms_norm(x[i : i + 1], w, 1e-6) for i in range(70)]), whole)


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 32), torch.randn(32), 1e-6).shape == (0, 32)


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.randn(4, 32), torch.randn(32)
    for bad in (x.t(), torch.randn(4, 64)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous"):
            rms_norm(bad, w, 1e-6)
    with pytest.raises(ValueError, match="shape"):
        rms_norm(x, torch.randn(31), 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm_backward(x, torch.randn(32, 4).t(), w, 1e-6)
