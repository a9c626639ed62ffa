"""Training stops for an arrival between any two pieces of its work and goes on to the same bits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coserve.core.training_sequence import TrainingSequence
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.kernels import linear
from coserve.layers.lm_head import LMHead
from coserve.training import checkpoint, optimizer
from coserve.training.batch_run import BatchRun
from coserve.training.job import JobSpec, LoraSpec
from coserve.training.unit_calls import UnitCalls
from tests.invariants import world

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"targets": ("q_proj", "down_proj", "lm_head")},
    "adamw_8bit": {"optimizer": "adamw_8bit", "loraplus_lr_ratio": 4.0},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
    "validation": {"validation": True, "eval_steps": 2},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's products and buffers would be one piece each."""
    monkeypatch.setattr(linear, "PART", 1 << 12)
    monkeypatch.setattr(linear, "LEAST_ROWS", 4)
    monkeypatch.setattr(optimizer, "PIECE", 512)
    monkeypatch.setattr(optimizer, "QUANTIZED_FROM", 64)


def job(case: str, data: Path, folder: Path) -> JobSpec:
    changes = dict(CASES[case])
    targets = changes.pop("targets", None)
    if changes.pop("validation", False):
        changes["validation"] = data
    spec = world.make_job(data, folder, **changes)
    if targets is None:
        return spec
    return msgspec.structs.replace(spec, lora=LoraSpec(r=4, target_modules=targets))


def train(model: Path, spec: JobSpec, arrivals: Callable[[], bool], **settings: Any) -> LocalEngine:
    local = world.make_engine(model, **settings)
    local.engine.arrivals = arrivals
    world.submit(local, spec)
    return local


@pytest.mark.parametrize("case", CASES)
def test_a_job_that_rests_at_random_comes_to_the_same(model, data, tmp_path, monkeypatch, case) -> None:
    alone, busy = (job(case, data, tmp_path / name) for name in ("alone", "busy"))
    quiet = train(model, alone, lambda: False)
    world.finish(quiet, alone.job_id)

    rested: set[str] = set()
    run_units = BatchRun.run_units

    def noted(self: BatchRun, sequence: TrainingSequence, length: int, stop: Callable[[], bool]) -> bool:
        kind = sequence.units[sequence.unit_cursor].kind
        done = run_units(self, sequence, length, stop)
        rested.update([] if done else [kind])
        return done

    monkeypatch.setattr(BatchRun, "run_units", noted)
    chance = random.Random(7)
    local = train(model, busy, lambda: chance.random() < 0.2)
    spent = 0
    while world.status_of(local, busy.job_id) != "succeeded":
        local.engine.step()
        rested.update("update" for job in local.engine.jobs._jobs.values() if job.is_updating)
        spent += 1
        if spent % 25 == 0:
            local.add(f"r{spent}", [3, 4, 5 + spent % 50], world.GREEDY)
        assert spent < 20_000
    assert {"loss", "layer", "update"} <= rested
    assert world.same_bits(world.final_adapter(busy), world.final_adapter(alone))
    assert world.progress(local, busy.job_id) == world.progress(quiet, alone.job_id)
    assert world.validations(local, busy.job_id) == world.validations(quiet, alone.job_id)
    local.run_until(lambda: not local.engine.scheduler.has_requests, 5000)
    assert world.pool_is_empty(local)


def test_a_resting_layer_is_finished_before_its_memory_goes(model, data, tmp_path, monkeypatch) -> None:
    """Requests that need the pool take levels of activations from a microbatch whose call rests."""
    alone, busy = (world.make_job(data, tmp_path / name) for name in ("alone", "busy"))
    quiet = train(model, alone, lambda: False)
    world.finish(quiet, alone.job_id)
    slab = quiet.engine.kv.slab_bytes
    local = train(model, busy, lambda: False, kv_cache_memory_bytes=256 * slab, max_model_len=512)
    queue, finished = local.engine.scheduler.training, []
    finish = local.engine.jobs.calls.finish_layer

    def noted(sequence: TrainingSequence) -> None:
        rests = sequence.resting is not None
        finish(sequence)
        finished.append(rests and sequence.resting is None)

    monkeypatch.setattr(local.engine.jobs.calls, "finish_layer", noted)
    chance = random.Random(3)
    local.engine.arrivals = lambda: chance.random() < 0.5
    asked = 0

    def step_under_pressure() -> bool:
        nonlocal asked
        rests = any(s.resting is not None and s.trains and s.unit_cursor > 0 for s in queue.sequences)
        if rests and local.engine.blocks.num_extent_slabs > 100 and len(local.finished) == asked:
            for _ in range(10):
                local.add(str(asked), [3 + asked % 90] * 16 * 12, world.GREEDY)
                asked += 1
        return any(finished) or world.status_of(local, busy.job_id) == "succeeded"

    local.run_until(step_under_pressure, 20_000)
    local.engine.arrivals = lambda: False
    world.finish(local, busy.job_id)
    assert any(finished), "no call rested when its memory was taken"
    assert world.same_bits(world.final_adapter(busy), world.final_adapter(alone))
    assert world.progress(local, busy.job_id) == world.progress(quiet, alone.job_id)


def test_no_piece_of_a_heads_call_is_longer_than_it_may_be(model, data, tmp_path, monkeypatch) -> None:
    """The reaction is bounded in work, whatever the machine: once `stop` says so nothing more begins."""
    within: list[bool] = []  # of each product of the head
    columns, backward = LMHead.forward_columns, LMHead.backward_input

    def forward_columns(self: LMHead, x: Any, y: Any, part: slice) -> None:
        most = max(linear.PANEL, linear.PART // (len(x) * self.in_features))
        within.append(part.stop - part.start <= most)
        columns(self, x, y, part)

    def backward_input(self: LMHead, dy: Any) -> Any:
        within.append(len(dy) <= linear.LEAST_ROWS)
        return backward(self, dy)

    monkeypatch.setattr(LMHead, "forward_columns", forward_columns)
    monkeypatch.setattr(LMHead, "backward_input", backward_input)
    pieces: list[list[bool]] = []
    run_next = UnitCalls.run_next

    def watched(self: UnitCalls, length: int, stop: Callable[[], bool]) -> bool:
        within.clear()
        done = run_next(self, length, lambda: True)
        pieces.append(list(within))
        return done

    monkeypatch.setattr(UnitCalls, "run_next", watched)
    spec = world.make_job(data, tmp_path, n_epochs=1)
    local = train(model, spec, lambda: False)
    world.finish(local, spec.job_id)
    head = [piece for piece in pieces if piece]
    assert len(head) > 20 and all(piece == [True] for piece in head)


def test_a_checkpoint_on_its_way_stops_nobody_and_the_next_update_waits(
    model, data, tmp_path, monkeypatch
) -> None:
    alone, busy = (world.make_job(data, tmp_path / name) for name in ("alone", "busy"))
    quiet = train(model, alone, lambda: False)
    world.finish(quiet, alone.job_id)
    may_write, write = threading.Event(), checkpoint._write

    def slow(*args: Any) -> Path:
        assert may_write.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "_write", slow)
    local = train(model, busy, lambda: False)
    local.run_until(lambda: len(world.progress(local, busy.job_id)) == 2, 5000)
    (running,) = local.engine.jobs._jobs.values()
    assert running.is_writing
    answer = local.generate([3, 4, 5], world.GREEDY)
    assert answer == quiet.generate([3, 4, 5], world.GREEDY)
    local.run_until(lambda: all(s.done for s in running.sequences), 5000)
    for _ in range(5):
        local.engine.step()
    assert running.step == 2 and local.engine.jobs.has_work
    assert not [c for c in local.sent if isinstance(c, m.JobCheckpoint)], "told of before it is on disk"
    may_write.set()
    world.finish(local, busy.job_id)
    assert world.same_bits(world.final_adapter(busy), world.final_adapter(alone))
    order = [s for s in local.sent if isinstance(s, m.JobCheckpoint | m.JobProgress)]
    steps = [s.metrics.step if isinstance(s, m.JobProgress) else -s.step for s in order]
    assert steps == [1, 2, -2, 3, 4, -4, 5, 6, -6]


@pytest.mark.parametrize("action", ["pause", "stop"])
def test_an_update_that_rests_is_finished_before_the_job_leaves(model, data, tmp_path, action) -> None:
    alone, busy = (world.make_job(data, tmp_path / name) for name in ("alone", "busy"))
    quiet = train(model, alone, lambda: False)
    world.finish(quiet, alone.job_id)
    chance = random.Random(1)
    local = train(model, busy, lambda: chance.random() < 0.5)
    (running,) = local.engine.jobs._jobs.values()
    local.run_until(lambda: running.is_updating and running.step == 2, 20_000)
    if action == "pause":
        reply = local.call(lambda i: m.ControlJob(call_id=i, job_id=busy.job_id, action="pause"))
        assert reply.error is None and not running.is_updating and running.step == 3 and not running.unsaved
        local.call(lambda i: m.ControlJob(call_id=i, job_id=busy.job_id, action="resume"))
    else:
        local.call(lambda i: m.Shutdown(call_id=i))
        local = train(model, busy, lambda: False)
        assert [step for step, _, _ in world.progress(local, busy.job_id)] == [3]
    local.engine.arrivals = lambda: False
    world.finish(local, busy.job_id)
    assert world.same_bits(world.final_adapter(busy), world.final_adapter(alone))
