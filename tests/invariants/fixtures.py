"""The tiny model and its data as fixtures, for the conftest of each folder that tests whole engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import world


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory; nobody writes into it."""
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training examples; nobody writes into them."""
    return world.make_data(tmp_path_factory.mktemp("data") / "train")
