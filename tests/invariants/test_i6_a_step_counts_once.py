"""I6: whenever it is killed, a job resumes from its newest whole checkpoint and replays to the same bits."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training import optimizer
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec

from . import world


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The uninterrupted run."""
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path_factory.mktemp("whole"))
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.final_adapter(spec), world.progress(local, spec.job_id)


@pytest.mark.parametrize("engine_steps", [1, 7, 15, 24, 33])
def test_a_killed_job_goes_on_to_the_same_bits(model, data, tmp_path, whole, engine_steps) -> None:
    spec = world.make_job(data, tmp_path)
    killed = world.make_engine(model)
    world.submit(killed, spec)
    for _ in range(engine_steps):
        killed.engine.step()
    before = world.progress(killed, spec.job_id)
    again = world.make_engine(model)
    world.submit(again, spec)
    world.finish(again, spec.job_id)
    after = world.progress(again, spec.job_id)
    log = {step: (loss, norm) for step, loss, norm in before}
    for step, loss, norm in after:
        assert log.setdefault(step, (loss, norm)) == (loss, norm), "replayed to the same bits"
    assert [(step, *log[step]) for step in sorted(log)] == whole[1]
    assert len({step for step, _, _ in after}) == len(after)
    assert world.same_bits(world.final_adapter(spec), whole[0])


def test_a_torn_checkpoint_is_not_used(model, data, tmp_path, whole) -> None:
    spec = world.make_job(data, tmp_path)
    local = world.make_engine(model)
    world.submit(local, spec)
    local.run_until(lambda: len(local.take(m.JobCheckpoint)) > 0, 5000)
    newest = max(Path(spec.checkpoint_dir).iterdir())
    torn = newest / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    shutil.copytree(newest, newest.with_name("step-000999.tmp"))
    again = world.make_engine(model)
    world.submit(again, spec)
    world.finish(again, spec.job_id)
    assert world.same_bits(world.final_adapter(spec), whole[0])


def test_stopping_the_engine_checkpoints_the_last_step(model, data, tmp_path, whole) -> None:
    spec = world.make_job(data, tmp_path, checkpoint_steps=1000)
    local = world.make_engine(model)
    world.submit(local, spec)
    local.run_until(lambda: len(world.progress(local, spec.job_id)) == 3, 5000)
    local.call(lambda i: m.Shutdown(call_id=i))
    assert local.engine.stopped
    again = world.make_engine(model)
    world.submit(again, spec)
    assert [step for step, _, _ in world.progress(again, spec.job_id)] == [1, 2, 3]
    world.finish(again, spec.job_id)
    assert world.same_bits(world.final_adapter(spec), whole[0])


# Everything that has state of its own between two steps, or random numbers.
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "adamw_8bit": {"optimizer": "adamw_8bit", "loraplus_lr_ratio": 4.0},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
    "sgd-without-momentum": {"optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.0},
    "dropout": {"lora_dropout": 0.4, "freeze_a": True},
    "packing": {"packing": True, "max_length": 128, "batch_size": 2},
    "kl": {"kl_coef": 0.3, "label_smoothing": 0.1},
    "dpo": {"method": "dpo", "learning_rate": 1e-2, "eval_steps": 2, "validation": True, "batch_size": 2},
    "dpo-from-an-adapter": {"method": "dpo", "learning_rate": 1e-2, "init": True, "batch_size": 2},
    "validation": {"validation": True, "eval_steps": 2, "checkpoint_steps": 3},
    "early-stopping": {
        "validation": True, "eval_steps": 1, "n_epochs": 30, "learning_rate": 5e-2, "warmup_steps": 0,
        "early_stopping_patience": 2,
    },
}  # fmt: skip


class Cases:
    """Jobs of the cases, and what they come to without interruption."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.data = world.make_data(folder / "train")
        self.validation = world.make_data(folder / "validation", examples=20, seed=8)
        self.pairs = folder / "pairs"
        rows = TokenDataset.open(self.data)
        TokenDataset.write(self.pairs, (rows[i] for i in range(len(rows))), pairs=True)
        self.outcome = cache(self._outcome)
        self.count = 0

    def job(self, case: str) -> JobSpec:
        """A job of its own folder."""
        changes = dict(CASES[case])
        lora = {name: changes.pop(name) for name in ("lora_dropout", "freeze_a") if name in changes}
        method, init = changes.pop("method", "supervised"), changes.pop("init", False)
        data, validation = (self.pairs,) * 2 if method == "dpo" else (self.data, self.validation)
        if changes.pop("validation", False):
            changes["validation"] = validation
        self.count += 1
        spec = world.make_job(data, self.folder / str(self.count), **changes)
        start = self.outcome("adamw") and str(self.folder / "start") if init else None
        return replace(spec, lora=replace(spec.lora, **lora), method=method, init_path=start)

    def _outcome(self, case: str) -> tuple[Any, ...]:
        local, spec = world.make_engine(self.model), self.job(case)
        world.submit(local, spec)
        world.finish(local, spec.job_id)
        if case == "adamw":
            newest = max(Path(spec.checkpoint_dir).iterdir())
            shutil.copytree(newest, self.folder / "start")
        return self.result(local, spec)

    @staticmethod
    def result(local: LocalEngine, spec: JobSpec) -> tuple[Any, ...]:
        """(log, evaluations, published adapter) with every step once; replayed steps must be the same."""
        log: dict[int, tuple[float, float]] = {}
        for step, loss, norm in world.progress(local, spec.job_id):
            assert log.setdefault(step, (loss, norm)) == (loss, norm), "replayed to other bits"
        scores: dict[int, tuple[float, float]] = {}
        for step, loss, accuracy in world.validations(local, spec.job_id):
            assert scores.setdefault(step, (loss, accuracy)) == (loss, accuracy), "scored to other bits"
        return log, scores, world.published(local, spec.job_id)


@pytest.fixture(scope="module")
def cases(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "QUANTIZED_FROM", 64)  # the tiny adapter's tensors would all stay fp32
        yield Cases(model, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("case", CASES)
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    interruptions=st.lists(
        st.tuples(st.integers(1, 70), st.sampled_from(["kill", "stop", "pause"])), min_size=1, max_size=4
    )
)
def test_interrupted_at_any_unit_it_comes_to_the_same(cases, case, interruptions) -> None:
    """Steps of one unit each; then the job's object is dropped, with or without the checkpoint that a clean
    stop writes, and made again from what is on disk."""
    local, spec = world.make_engine(cases.model), cases.job(case)
    local.engine.arrivals = lambda: True  # a step ends after one unit
    world.submit(local, spec)
    for units, how in interruptions:
        for _ in range(units):
            local.engine.step()
        if world.status_of(local, spec.job_id) == "succeeded":
            break
        if how == "pause":
            local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="pause"))
        elif how == "stop":
            local.engine.jobs.checkpoint_all()
        local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="cancel"))
        assert world.pool_is_empty(local)
        world.submit(local, spec)
    local.engine.arrivals = lambda: False
    world.finish(local, spec.job_id)
    log, scores, adapter = cases.result(local, spec)
    wanted = cases.outcome(case)
    assert (log, scores) == wanted[:2]
    assert world.same_bits(adapter, wanted[2])


@pytest.mark.parametrize("case", ["early-stopping", "adamw_8bit"])
def test_interrupted_after_every_step_it_comes_to_the_same(cases, case) -> None:
    local, spec = world.make_engine(cases.model), cases.job(case)
    world.submit(local, spec)
    told = 0
    while world.status_of(local, spec.job_id) != "succeeded":
        local.engine.step()
        if len(world.progress(local, spec.job_id)) > told and local.engine.jobs.has_work:
            local.engine.jobs.checkpoint_all()
            local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="cancel"))
            world.submit(local, spec)
            told = len(world.progress(local, spec.job_id))
    log, scores, adapter = cases.result(local, spec)
    wanted = cases.outcome(case)
    assert (log, scores) == wanted[:2]
    assert world.same_bits(adapter, wanted[2])


def test_early_stopping_stops_in_that_case(cases) -> None:
    log, scores, _ = cases.outcome("early-stopping")
    best = min(scores, key=lambda step: scores[step][0])
    assert max(log) == best + 2 < 90
