"""Every test that takes `isa` runs the C++ kernels on each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.kernels import dispatch

LEVELS = () if dispatch.native is None else dispatch.ISA_LEVELS[: dispatch.native.max_isa() + 1]
UNBUILT = pytest.param("", marks=pytest.mark.skip(reason="the compiled kernels are not built"))


@pytest.fixture(params=LEVELS or (UNBUILT,))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.use_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """A fixed seed, and one thread: tiny tests gain nothing from more; those about threads set their own."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)
