"""The tiny model and its data as fixtures, for the conftest of each folder that tests whole engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve.engine import messages as m

from . import world


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory; nobody writes into it."""
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training examples; nobody writes into them."""
    return world.make_data(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="session")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[m.AdapterRef]:
    """Three adapters of ranks 2, 4 and 8."""
    folder = tmp_path_factory.mktemp("adapters")
    return [world.make_adapter(model, folder / f"a{rank}", rank, seed=rank) for rank in (2, 4, 8)]
