"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_grad_mode() -> Iterator[None]:
    """An engine in this process switches autograd off for good; the next test's reference may need it."""
    with torch.enable_grad():
        yield
