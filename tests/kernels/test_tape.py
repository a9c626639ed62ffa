"""A tape plays what was recorded, and what can't be recorded is refused."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels import dispatch
from coserve.kernels.rms_norm import rms_norm
from coserve.kernels.swiglu import swiglu
from coserve.kernels.tape import record

pytestmark = pytest.mark.skipif(dispatch.native is None, reason="needs the compiled module")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8)


def test_a_tape_follows_its_input(x) -> None:
    weight = torch.rand(8)

    def run() -> torch.Tensor:
        return swiglu(rms_norm(x, weight, 1e-6).add_(x).view(6, 4)).view(3, -1)[1:]

    tape = record(run)
    assert tape is not None and tape.nbytes == x.nbytes + x.nbytes // 2
    x.copy_(torch.randn(3, 8))
    played = tape.play()
    assert torch.equal(played, run())
    assert tape.play().data_ptr() == played.data_ptr()


def test_an_operation_that_makes_new_memory_is_refused(x) -> None:
    assert record(lambda: swiglu(x + x)) is None


def test_a_value_read_by_python_is_refused(x) -> None:
    assert record(lambda: swiglu(x[: len(x) - int(x[0, 0] > 9)])) is None


def test_a_kernel_that_bypasses_the_dispatch_is_refused(x) -> None:
    native = dispatch.native

    def run() -> torch.Tensor:
        y = torch.empty(3, 4)
        native.swiglu(0, x.data_ptr(), 3, 4, 0, y.data_ptr())
        return y

    assert record(run) is None


def test_the_references_are_refused(x) -> None:
    with dispatch.use_backend("reference"):
        assert record(lambda: swiglu(x)) is None
