"""What tests of whole jobs share; nobody writes into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.invariants import world


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory."""
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training examples."""
    return world.make_data(tmp_path_factory.mktemp("data") / "train")
