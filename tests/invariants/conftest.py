"""One tiny model and its data for all invariant tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import world
from .fixtures import adapters as adapters
from .fixtures import model as model


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training examples, of which the longer ones share a prefix; nobody writes into them."""
    return world.make_data(tmp_path_factory.mktemp("data") / "train", prompt=20)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sums are long enough to be cut into several."""
    return world.make_model(tmp_path_factory.mktemp("wide"), hidden_size=320, intermediate_size=600)
