"""Loads, replacements, uploads, rollbacks, unloads, deletions and deaths of the engine in any order, against
a whole server: a name gives its own version or an error, and no file is left of what nobody can reach."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coserve.lora.peft_files import read_adapter_info
from tests.server.fake_engine import MODEL, write_peft
from tests.server.running import ServerThread, wait_for

NAMES = ("x", "y")
SOURCES = 4


class Versions:
    """What a name should mean: its versions by number with their sources, and the current one."""

    def __init__(self) -> None:
        self.sources: dict[int, int] = {}
        self.uploaded: set[int] = set()
        self.kept: dict[int, int] = {}  # unloaded, but their files stay
        self.current = self.highest = 0

    def publish(self, source: int, *, uploaded: bool) -> None:
        self.highest += 1
        self.sources[self.highest] = source
        self.current = self.highest
        if uploaded:
            self.uploaded.add(self.highest)

    def remove(self, number: int, *, keep: bool) -> None:
        source = self.sources.pop(number)
        if keep and number in self.uploaded:
            self.kept[number] = source
        if number == self.current:
            self.current = max(self.sources, default=0)


class Machine(RuleBasedStateMachine):
    """`server`, `http` and `folder` (with the sources) are the test's."""

    server: ServerThread
    http: httpx.Client
    folder: Path
    asked = examples = 0

    @initialize()
    def begin(self) -> None:
        """Names that no other example has."""
        type(self).examples += 1
        self.names = {f"{name}-{self.examples}": Versions() for name in NAMES}

    def full(self, name: str) -> str:
        return f"{name}-{self.examples}"

    @rule(name=st.sampled_from(NAMES), source=st.integers(0, SOURCES - 1), inplace=st.booleans())
    def load(self, name: str, source: int, inplace: bool) -> None:
        name = self.full(name)
        body = {"lora_name": name, "lora_path": str(self.folder / str(source)), "load_inplace": inplace}
        status = self.http.post("/v1/load_lora_adapter", json=body).status_code
        if self.names[name].sources and not inplace:
            assert status == 400
        else:
            assert status == 200
            self.names[name].publish(source, uploaded=False)

    @rule(name=st.sampled_from(NAMES), source=st.integers(0, SOURCES - 1))
    def upload(self, name: str, source: int) -> None:
        name = self.full(name)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path in (self.folder / str(source)).iterdir():
                tar.add(path, path.name)
        assert self.http.post(f"/v1/adapters?name={name}", content=out.getvalue()).status_code == 200
        self.names[name].publish(source, uploaded=True)

    @rule(name=st.sampled_from(NAMES), data=st.data(), delete=st.booleans())
    def remove_one(self, name: str, data: st.DataObject, delete: bool) -> None:
        name = self.full(name)
        number = data.draw(st.integers(1, 6))
        model = f"{name}@{number}"
        if delete:
            status = self.http.delete(f"/v1/models/{model}").status_code
        else:
            status = self.http.post("/v1/unload_lora_adapter", json={"lora_name": model}).status_code
        if number in self.names[name].sources:
            assert status == 200
            self.names[name].remove(number, keep=not delete)
        else:
            assert status == 404

    @rule(name=st.sampled_from(NAMES), delete=st.booleans())
    def remove_all(self, name: str, delete: bool) -> None:
        name = self.full(name)
        if delete:
            status = self.http.delete(f"/v1/models/{name}").status_code
        else:
            status = self.http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code
        assert status == (200 if self.names[name].sources else 404)
        for number in list(self.names[name].sources):
            self.names[name].remove(number, keep=not delete)
        if delete and status == 200:
            self.names[name].kept.clear()

    @rule(name=st.sampled_from(NAMES))
    def roll_back(self, name: str) -> None:
        name = self.full(name)
        versions = self.names[name]
        earlier = [number for number in versions.sources if number < versions.current]
        adapters = self.server.server.context.adapters
        if earlier:
            self.server.call(adapters.rollback(name, 0, None))
            versions.current = max(earlier)
        else:
            with pytest.raises(Exception, match=r"earlier version|does not exist"):
                self.server.call(adapters.rollback(name, 0, None))

    @rule(name=st.sampled_from(NAMES), source=st.integers(0, SOURCES - 1))
    def fail_to_load(self, name: str, source: int) -> None:
        """The engine dies before it has the weights."""
        name = self.full(name)
        self.server.engine.ready = False
        from coserve.errors import Unavailable

        self.server.engine.fail_load = Unavailable("The engine stopped and is being restarted.")
        body = {"lora_name": name, "lora_path": str(self.folder / str(source)), "load_inplace": True}
        status = self.http.post("/v1/load_lora_adapter", json=body).status_code
        self.server.engine.ready, self.server.engine.fail_load = True, None
        self.server.engine.loaded.clear()
        self.server.call(self.server.engine.on_restart())
        assert status == 503

    @rule(name=st.sampled_from(NAMES), source=st.integers(0, SOURCES - 1))
    def replace_under_a_request(self, name: str, source: int) -> None:
        """A request that has begun ends on its version; its files stay that long."""
        name = self.full(name)
        versions = self.names[name]
        if not versions.sources:
            return
        engine, began = self.server.engine, threading.Event()
        engine.requests.clear()
        engine.hold.clear()
        answers: list[int] = []

        def ask() -> None:
            with self.server.http() as other:
                began.set()
                answers.append(other.post("/v1/completions", json={"model": name, "prompt": "a"}).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            wait_for(lambda: bool(engine.requests))
            reader = engine.requests[0].adapter
            assert reader is not None
            short = name.partition("-")[0]
            self.remove_all(short, True)
            self.load(short, source, True)
            assert Path(reader.path).exists(), "somebody reads them"
        finally:
            engine.hold.set()
            thread.join(20)
        assert answers == [200]
        wait_for(lambda: not Path(reader.path).exists())

    @invariant()
    def each_name_gives_its_own_version_or_an_error(self) -> None:
        if not hasattr(self, "names"):
            return
        for name, versions in self.names.items():
            models = {name: versions.current} | {
                f"{name}@{n}": n for n in range(1, versions.highest + 1)[-4:]
            }
            for model, number in models.items():
                answer = self.http.post(
                    "/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1}
                )
                if number not in versions.sources:
                    assert answer.status_code == 404
                    continue
                assert answer.status_code == 200 and answer.json()["model"] == model
                used = self.server.engine.requests[-1].adapter
                assert used is not None and (used.name, used.version) == (name, number)
                assert used.digest == self.digests()[versions.sources[number]]
                assert Path(used.path, "adapter_model.safetensors").exists()
                type(self).asked += 1

    def digests(self) -> list[str]:
        return [read_adapter_info(self.folder / str(source), MODEL, None).digest for source in range(SOURCES)]

    def teardown(self) -> None:
        """On disk there is what is in service, and what may come back."""
        if not hasattr(self, "names"):
            return
        wanted = {
            f"{name}/{number}"
            for name, versions in self.names.items()
            for number in {*versions.sources, *versions.kept}
        }
        root = self.server.server.context.adapters._state.adapters
        own = f"*-{self.examples}/*"
        wait_for(lambda: {str(path.relative_to(root)) for path in root.glob(own)} == wanted)
        for name in self.names:
            self.http.delete(f"/v1/models/{name}")
        wait_for(lambda: not self.server.engine.loaded)


@pytest.fixture
def races(tmp_path: Path) -> Iterator[ServerThread]:
    for source in range(SOURCES):
        write_peft(tmp_path / "sources" / str(source), seed=source, rank=1, modules=("q_proj",))
    server = ServerThread(tmp_path / "state", adapter_roots=(str(tmp_path / "sources"),))
    yield server
    server.stop()


def test_whatever_is_done_to_names(races: ServerThread, tmp_path: Path) -> None:
    with races.http() as http:
        own = {"server": races, "http": http, "folder": tmp_path / "sources"}
        kind = type("OnThisServer", (Machine,), own)
        kind.TestCase.settings = settings(
            max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        )
        kind.TestCase("runTest").runTest()
    assert kind.asked > 30
