"""A real server with room for few adapters, the tiny model's engines, and adapters that change answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coserve.engine import messages as m
from tests.faults.served import Served
from tests.invariants import world
from tests.invariants.fixtures import model as model
from tests.server.conftest import adapter_root as adapter_root
from tests.server.conftest import http as http
from tests.server.conftest import module_server as module_server
from tests.server.conftest import server as server
from tests.server.fake_engine import write_peft


@pytest.fixture(scope="session")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[m.AdapterRef]:
    """Three adapters of the tiny model, of ranks 2, 4 and 8."""
    folder = tmp_path_factory.mktemp("adapters")
    return [world.make_adapter(model, folder / f"a{rank}", rank, seed=rank) for rank in (2, 4, 8)]


@pytest.fixture(scope="session")
def peft_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's --adapter-root, with adapters of the demo model: one, two, three."""
    root = tmp_path_factory.mktemp("peft")
    for seed, name in enumerate(("one", "two", "three")):
        write_peft(root / name, seed=seed)
    return root


@pytest.fixture(scope="session")
def served(peft_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`coserve serve` with the demo model; what fails in it must not leave a traceback."""
    flags = ("--adapter-root", str(peft_root), "--max-loras", "2", "--kv-cache-memory-bytes", "67108864")
    with Served(tmp_path_factory.mktemp("defects") / "state", *flags) as found:
        yield found
        assert found.terminate() == 0
    log = found.state_dir.with_suffix(".log").read_text() + (found.state_dir / "engine.log").read_text()
    assert "Traceback" not in log


@pytest.fixture
def load(served: Served, peft_root: Path) -> Iterator[object]:
    """Loads an adapter under a name, which goes with the test."""
    names: set[str] = set()

    def bring(name: str, source: str, **more: object) -> httpx.Response:
        names.add(name)
        body = {"lora_name": name, "lora_path": str(peft_root / source), **more}
        return served.http.post("/v1/load_lora_adapter", json=body)

    yield bring
    for name in names:
        served.http.delete(f"/v1/models/{name}")
