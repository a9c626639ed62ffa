"""The tiers: what is where, what is kept, and that whatever comes when, an adapter's rows are its own.

Files are read for real, but only when a test says so.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from coserve.core.adapter_slots import AdapterSlots
from coserve.errors import CoserveError, FailedPrecondition, InvalidRequest, NotFound
from coserve.lora.adapter import HostAdapter, load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.adapter_tiers import AdapterTiers
from coserve.lora.packed_adapter import load_packed
from coserve.lora.peft_files import read_adapter_info
from coserve.models.config import ModelConfig


class Reader:
    """Stands for the loader's threads: reads when it is told to."""

    def __init__(self) -> None:
        self.due: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, read: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.due.append((future, read, args))
        return future

    def read_one(self, index: int = 0) -> None:
        future, read, args = self.due.pop(index)
        try:
            future.set_result(read(*args))
        except Exception as error:
            future.set_exception(error)

    def shutdown(self, **how: bool) -> None:
        self.due.clear()


class World:
    """Tiers over a tiny model, and requests in a queue."""

    def __init__(self, config: ModelConfig, *, rows: int = 8, in_use: int = 4, host: int = 2) -> None:
        self.config, self.now = config, 0.0
        self.pool = AdapterPool(config, rows, torch.float32)
        self.slots = AdapterSlots(rows, 16, on_free=self.pool.free_heads)
        self.tiers = AdapterTiers(
            config, self.pool, self.slots, in_use, host, 1 << 30, clock=lambda: self.now
        )
        self.tiers._loader._threads.shutdown()
        self.reader = self.tiers._loader._threads = Reader()
        self.replies: list[CoserveError | None] = []

    def want(self, request: str, path: Path, order: float = 0.0) -> str:
        digest = digest_of(path, self.config)
        self.tiers.want(request, digest, path.name, str(path), (0, order, request))
        return digest

    def load(self, path: Path, pinned: bool = False) -> str:
        digest = digest_of(path, self.config)
        self.tiers.know(digest, path.name, str(path))
        self.tiers.load(digest, pinned, self.replies.append)
        return digest

    def read_all(self, busy: bool = False) -> dict[str, CoserveError]:
        failed = self.tiers.poll(busy)
        while self.reader.due:
            self.reader.read_one()
            failed |= self.tiers.poll(busy)
        return failed


_adapters: dict[Path, HostAdapter] = {}


def host_adapter(path: Path, config: ModelConfig) -> HostAdapter:
    if path not in _adapters:
        _adapters[path] = load_adapter(path, config)
    return _adapters[path]


def digest_of(path: Path, config: ModelConfig) -> str:
    return host_adapter(path, config).digest


@pytest.fixture
def world(config: ModelConfig) -> World:
    return World(config)


@pytest.fixture(scope="module")
def saved(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six adapters of ranks 1, 2 and 3 on q and v."""
    import peft
    import transformers

    found = []
    for number in range(6):
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        settings = {"r": 1 + number % 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.5)
        folder = tmp_path_factory.mktemp("saved") / f"a{number}"
        model.save_pretrained(folder)
        found.append(folder)
    return found


def holds(world: World, digest: str, path: Path) -> bool:
    """The digest's rows are the adapter of these files, and nothing else."""
    adapter, rows = host_adapter(path, world.config), world.slots.rows(digest)
    ranks = world.pool.ranks(rows)
    for number, name in enumerate(world.config.linear_modules):
        for layer in range(world.config.num_layers):
            a, b = (tensor[rows] for tensor in world.pool.rows(number, layer))
            weights = adapter.modules.get((layer, name))
            if weights is None:
                if a.any() or b.any() or ranks[layer, number]:
                    return False
            elif not (
                torch.equal(a, weights.a_RK)
                and torch.equal(b, weights.b_NR.t() * weights.scale)
                and ranks[layer, number] == len(weights.a_RK)
            ):
                return False
    return True


def test_a_request_is_found_in_the_tier_that_its_adapter_is_in(world: World, saved: list[Path]) -> None:
    digest = world.want("r1", saved[0])
    assert not world.tiers.acquire(digest)
    world.read_all()
    assert world.tiers.tiers() == {digest: "host"}
    assert world.tiers.acquire(digest) and holds(world, digest, saved[0])
    world.want("r2", saved[0])
    world.tiers.release(digest)
    for request in ("r1", "r2"):
        world.tiers.unwant(request)
    world.slots.unload(digest)
    world.want("r3", saved[0])
    assert world.tiers.found_in == {"disk": 1, "device": 1, "host": 1}


def test_what_is_registered_but_not_asked_for_is_not_known(world: World, saved: list[Path]) -> None:
    for number in range(5000):
        world.tiers.want(f"r{number}", f"digest-{number}", "name", "/nowhere", (0, 0.0, ""))
        world.tiers.unwant(f"r{number}")
    assert len(world.tiers._known) <= 64 and not world.tiers._requests and not world.tiers.is_loading


def test_files_are_read_in_the_queue_s_order(world: World, saved: list[Path]) -> None:
    for place, number in ((2.0, 0), (0.0, 1), (1.0, 2)):
        world.want(f"r{number}", saved[number], place)
    world.tiers._loader.start(lambda digest: digest, lambda size: len(world.reader.due) < 1)
    assert world.reader.due[0][2][0] == digest_of(saved[1], world.config)


def test_nothing_is_read_that_would_drive_out_what_is_waited_for(config, saved: list[Path]) -> None:
    world = World(config, in_use=1, host=2)
    for number in range(4):
        world.want(f"r{number}", saved[number], number)
    world.read_all()
    first = [digest_of(path, config) for path in saved[:2]]
    assert sorted(world.tiers.tiers()) == sorted(first), "the first two, and no other took their place"
    assert world.tiers.acquire(first[0])
    world.read_all()
    assert digest_of(saved[2], config) in world.tiers.tiers()


def test_host_memory_is_bounded_by_bytes_too(config, saved: list[Path]) -> None:
    world = World(config, host=100)
    world.tiers._max_host_bytes = 3000
    for path in saved:
        world.load(path)
        world.read_all()
        world.slots.unload(digest_of(path, config))
        assert world.tiers.host_bytes <= 3000
    assert world.replies == [None] * 6


def test_a_large_adapter_comes_to_the_device_over_several_steps(
    world: World, saved: list[Path], monkeypatch
) -> None:
    monkeypatch.setattr("coserve.lora.adapter_tiers.STEP_BYTES", 250)
    monkeypatch.setattr("coserve.lora.adapter_pool.PIECE_BYTES", 128)
    digest = world.want("r", saved[2])
    world.read_all(busy=True)
    steps = 0
    while not world.tiers.acquire(digest):
        assert digest not in world.tiers.poll(busy=True)
        steps += 1
        with pytest.raises(KeyError):
            world.pool.ranks(world.slots.rows(digest)) if not world.slots.is_ready(digest) else {}["ready"]
    assert steps > 2 and holds(world, digest, saved[2]) and not world.tiers.is_loading


def test_half_written_rows_are_nobody_else_s(config, saved: list[Path], monkeypatch) -> None:
    monkeypatch.setattr("coserve.lora.adapter_tiers.STEP_BYTES", 1)
    monkeypatch.setattr("coserve.lora.adapter_pool.PIECE_BYTES", 1)
    world = World(config, rows=3)
    first, second = world.want("r1", saved[2], 0.0), world.want("r2", saved[1], 1.0)
    world.read_all(busy=True)
    assert not world.tiers.acquire(first) and not world.tiers.acquire(second)
    assert world.slots.keys == [first]
    world.tiers.unload(first)
    assert world.slots.keys == [] and not world.tiers.is_loading
    world.tiers.poll(busy=False)
    assert world.tiers.acquire(second) and holds(world, second, saved[1])


def test_unload_frees_rows_and_copy_also_while_the_files_are_read(world: World, saved: list[Path]) -> None:
    """vllm#54839: nothing of it stays on either tier; a reload holds one copy."""
    digest = world.load(saved[0])
    world.read_all()
    assert world.tiers.host_bytes and world.slots.rows_in_use
    world.tiers.unload(digest)
    assert world.tiers.tiers() == {} and world.tiers.host_bytes == 0 and world.slots.rows_in_use == 0
    world.want("r", saved[0])
    world.tiers.poll(busy=False)
    world.tiers.unwant("r")
    world.tiers.unload(digest)
    world.read_all()
    assert world.tiers.tiers() == {}
    world.load(saved[0])
    world.read_all()
    assert world.slots.keys == [digest] and len(world.tiers._host) == 1
    with pytest.raises(NotFound):
        world.tiers.unload("never heard of")


def test_files_that_are_another_version_s_are_refused(config, saved: list[Path]) -> None:
    with pytest.raises(FailedPrecondition, match="have changed"):
        load_packed(saved[0], config, torch.float32, digest="another", max_rows=8)
    with pytest.raises(FailedPrecondition, match="rank 3 is over the 2 rows"):
        load_packed(saved[2], config, torch.float32, digest=digest_of(saved[2], config), max_rows=2)


def test_a_load_that_fails_is_told_and_tried_again(world: World, saved: list[Path], tmp_path: Path) -> None:
    digest = digest_of(saved[0], world.config)
    world.tiers.want("r", digest, "a", str(tmp_path / "gone"), (0, 0.0, ""))
    assert isinstance(world.read_all()[digest], NotFound)
    world.tiers.unwant("r")
    world.want("again", saved[0])
    assert world.read_all() == {} and world.tiers.acquire(digest)


def test_a_file_is_read_where_a_request_still_keeps_it(
    world: World, saved: list[Path], tmp_path: Path
) -> None:
    """Two names with the same content: the folder of one may go while a request on the other waits."""
    digest = world.want("mine", saved[0])
    world.tiers.want("other", digest, "b", str(tmp_path / "gone"), (0, 1.0, ""))
    world.tiers.unwant("other")
    assert world.read_all() == {} and world.tiers.acquire(digest)


def test_pins_leave_a_place_for_the_others(config, saved: list[Path]) -> None:
    world = World(config, in_use=2)
    pinned = world.load(saved[0], pinned=True)
    world.read_all()
    world.load(saved[1], pinned=True)
    assert world.replies[0] is None and isinstance(world.replies[1], FailedPrecondition)
    assert "--max-loras 2" in world.replies[1].message
    for path in saved[1:]:
        digest = world.want(path.name, path)
        world.read_all()
        assert world.tiers.acquire(digest)
        world.tiers.release(digest)
        world.tiers.unwant(path.name)
    assert world.slots.is_ready(pinned)
    world.load(saved[0], pinned=False)
    assert world.slots.is_idle(pinned)


def test_a_pin_that_finds_no_room_gets_the_first_there_is(config, saved: list[Path]) -> None:
    world = World(config, rows=3)
    busy = world.want("r", saved[2])
    world.read_all()
    assert world.tiers.acquire(busy)
    pinned = world.load(saved[0], pinned=True)
    world.read_all()
    assert pinned not in world.slots
    world.tiers.release(busy)
    world.tiers.poll(busy=False)
    assert world.slots.is_ready(pinned) and holds(world, pinned, saved[0])


def test_a_pin_that_was_taken_back_is_not_placed_unasked(config, saved: list[Path]) -> None:
    world = World(config, rows=3)
    busy = world.want("r", saved[2])
    world.read_all()
    assert world.tiers.acquire(busy)
    pinned = world.load(saved[0], pinned=True)
    world.read_all()
    world.load(saved[0], pinned=False)
    world.tiers.release(busy)
    world.tiers.poll(busy=False)
    assert world.slots.keys == [busy] and pinned not in world.slots


class Machine(RuleBasedStateMachine):
    """Requests, loads, pins, unloads and failures in any order, with reads that end at any time."""

    config: ModelConfig
    paths: list[Path]
    served = 0  # requests, over all runs

    @initialize(in_use=st.integers(2, 4), host=st.integers(1, 3), rows=st.integers(3, 14))
    def begin(self, in_use: int, host: int, rows: int) -> None:
        self.world = World(self.config, rows=rows, in_use=in_use, host=host)
        self.waiting: list[tuple[str, int]] = []
        self.running: list[tuple[str, int]] = []
        self.count = 0
        self.in_use = in_use
        self.may_pin = rows >= 3 * in_use  # as many as the server has

    def digest(self, number: int) -> str:
        return digest_of(self.paths[number], self.config)

    @rule(number=st.integers(0, 5))
    def request(self, number: int) -> None:
        self.count += 1
        self.world.want(f"r{self.count}", self.paths[number], self.count)
        self.waiting.append((f"r{self.count}", number))

    @rule(busy=st.booleans(), seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def step(self, busy: bool, seconds: float) -> None:
        self.world.now += seconds
        for digest in self.world.tiers.poll(busy):
            for request, number in [w for w in self.waiting if self.digest(w[1]) == digest]:
                self.waiting.remove((request, number))
                self.world.tiers.unwant(request)
        for request, number in list(self.waiting):
            if self.world.tiers.acquire(self.digest(number)):
                self.waiting.remove((request, number))
                self.running.append((request, number))
                type(self).served += 1
                assert holds(self.world, self.digest(number), self.paths[number])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), preempted=st.booleans())
    def leave(self, data: st.DataObject, preempted: bool) -> None:
        request, number = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.world.tiers.release(self.digest(number))
        if preempted:
            self.waiting.insert(0, (request, number))
        else:
            self.world.tiers.unwant(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request, _ = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.world.tiers.unwant(request)

    @precondition(lambda self: self.world.reader.due)
    @rule(data=st.data(), broken=st.sampled_from([False, False, False, True]))
    def read(self, data: st.DataObject, broken: bool) -> None:
        index = data.draw(st.integers(0, len(self.world.reader.due) - 1))
        if broken:
            future, _, args = self.world.reader.due[index]
            self.world.reader.due[index] = future, load_rows_of_nothing, args
        self.world.reader.read_one(index)

    @rule(number=st.integers(0, 5), pinned=st.booleans())
    def load(self, number: int, pinned: bool) -> None:
        self.world.load(self.paths[number], pinned and self.may_pin)

    @rule(number=st.integers(0, 5))
    def unload(self, number: int) -> None:
        try:
            self.world.tiers.unload(self.digest(number))
        except NotFound:
            assert self.digest(number) not in self.world.slots

    @invariant()
    def rows_are_owned_once_and_hold_what_is_read(self) -> None:
        if not hasattr(self, "world"):
            return
        slots = self.world.slots
        rows = [row for key in slots.keys for row in slots.rows(key)]
        assert len(rows) == len(set(rows)) == slots.rows_in_use
        for number in {number for _, number in self.running}:
            assert holds(self.world, self.digest(number), self.paths[number])
        assert len({slot.key for slot in slots.held if slot.readers}) <= self.in_use
        assert sum(slot.readers for slot in slots.held) == len(self.running)

    def teardown(self) -> None:
        """Whatever was left ends: everybody gets his adapter, and then everything is free."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(200):
            while world.reader.due:
                world.reader.read_one()
            self.step(False, 0.5)
            for request, number in self.running:
                world.tiers.release(self.digest(number))
                world.tiers.unwant(request)
            self.running = []
            if not self.waiting:
                break
        assert not self.waiting, "somebody is never let in"
        for number in range(6):
            self.unload(number)
        world.read_all()
        assert world.slots.keys == [] and world.tiers.host_bytes == 0 and not world.tiers.is_loading
        assert not world.tiers._requests


def load_rows_of_nothing(path: str, digest: str) -> None:
    raise NotFound("no such adapter directory")


def test_whatever_comes_when(config: ModelConfig, saved: list[Path]) -> None:
    kind = type("OfThisModel", (Machine,), {"config": config, "paths": saved})
    kind.TestCase.settings = settings(
        max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    kind.TestCase("runTest").runTest()
    assert kind.served > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_module(config, save_adapter, side, value, dtype) -> None:
    path = save_adapter(target_modules=["q_proj", "v_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight"
    tensors[name][0, 0] = value
    save_file(tensors, path / "adapter_model.safetensors")
    digest = read_adapter_info(path, config, None).digest
    with pytest.raises(InvalidRequest, match=r"layers\.1\.self_attn\.v_proj holds values"):
        load_packed(path, config, dtype, digest=digest, max_rows=8)
