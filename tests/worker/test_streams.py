"""Units beside the forward: the same adapter and answers, and nothing runs beside across two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coserve.engine.local import LocalEngine
from coserve.worker.streams import InOrder
from tests.invariants import world

PROMPT = [5, 9, 3, 40]


class Overlapping(InOrder):
    """A second stream's stand-in, which notes the order of things."""

    overlaps = True

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.log.append("launch")
        with super().beside():
            yield

    def join(self) -> float:
        self.log.append("join")
        return super().join()


def overlapping(model: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    local = world.make_engine(model, max_num_batched_tokens=64)
    engine = local.engine
    engine.jobs.calls.streams = engine.streams = Overlapping(log)

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(engine.runner, "run", noted("forward", engine.runner.run))
    monkeypatch.setattr(engine.jobs, "advance", noted("commit", engine.jobs.advance))
    return local


def run(local: LocalEngine, data: Path, folder: Path) -> tuple[list[int], Any, Any]:
    spec = world.make_job(data, folder, n_epochs=1)
    world.submit(local, spec)
    for number in range(6):
        local.add(str(number), PROMPT, world.GREEDY)
    world.finish(local, spec.job_id)
    return local.tokens["0"], world.progress(local, spec.job_id), world.final_adapter(spec)


def test_a_unit_beside_each_forward_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    tokens, steps, adapter = run(world.make_engine(model), data, tmp_path / "alone")
    log: list[str] = []
    got_tokens, got_steps, got_adapter = run(overlapping(model, log, monkeypatch), data, tmp_path / "beside")
    assert got_tokens == tokens and got_steps == steps
    assert world.same_bits(got_adapter, adapter)

    text = " ".join(log)
    assert "forward launch join" in text
    for step in text.split("commit"):
        order = [word for word in step.split() if word != "forward"]
        assert order == ["launch", "join"] * (len(order) // 2), "joined before anything else begins"


def test_a_fault_beside_the_forward_ends_the_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    local = overlapping(model, [], monkeypatch)
    spec = world.make_job(data, tmp_path / "job")
    world.submit(local, spec)
    job = local.engine.jobs._jobs[spec.job_id]

    def fault(sequence: Any, length: int, stop: Any) -> None:
        raise RuntimeError("a kernel's fault")

    monkeypatch.setattr(job, "run_units", fault)
    local.add("chat", PROMPT, world.GREEDY)
    local.run_until(lambda: "chat" in local.finished and world.status_of(local, spec.job_id) == "failed", 500)
    assert len(local.tokens["chat"]) == world.GREEDY.max_tokens
    local.generate(PROMPT, world.GREEDY)
    assert world.pool_is_empty(local)
