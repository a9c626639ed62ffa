"""Jobs by every method in a real engine: what they report, and that nothing beside them changes a bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from coserve.core.step_plan import StepPlan
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, StepMetrics
from tests.invariants import world


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of unequal lengths; the answer in even numbers is preferred to the one in odd numbers."""
    generator = torch.Generator().manual_seed(8)
    rows = []
    for index in range(8):
        prompt = torch.randint(2, world.VOCAB, (6 + 9 * index,), generator=generator).tolist()
        for odd in (0, 1):
            answer = (torch.randint(1, 40, (5 + index + 3 * odd,), generator=generator) * 2 + odd).tolist()
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
    target = tmp_path_factory.mktemp("data") / "pairs"
    TokenDataset.write(target, rows, pairs=True)
    return target


def job(data: Path, folder: Path, method: str, job_id: str = "ftjob-1", **more: Any) -> JobSpec:
    init = more.pop("init_path", None)
    spec = world.make_job(data, folder, job_id, **more)
    return msgspec.structs.replace(spec, method=method, init_path=init)


def told(local: LocalEngine, job_id: str = "ftjob-1") -> list[StepMetrics]:
    return [s.metrics for s in local.sent if isinstance(s, m.JobProgress) and s.job_id == job_id]


def train(model: Path, spec: JobSpec) -> list[StepMetrics]:
    local = world.make_engine(model)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    assert world.pool_is_empty(local) and local.engine.slots.keys == [spec.job_id]
    assert world.rows_are_idle(local)
    return told(local, spec.job_id)


@pytest.fixture(scope="module")
def preferred(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory):
    """A whole preference job alone."""
    folder = tmp_path_factory.mktemp("preferred")
    spec = job(pairs, folder, "dpo", n_epochs=8, batch_size=8, learning_rate=6e-2, beta=0.5)
    return spec, train(model, spec)


def test_a_preference_job_learns_which_answer_is_preferred(preferred) -> None:
    _, metrics = preferred
    assert len(metrics) == 8, "batch_size counts pairs"
    assert metrics[0].loss == pytest.approx(math.log(2), abs=1e-6) and metrics[0].accuracy == 0.0
    assert metrics[-1].loss < 0.3 and metrics[-1].accuracy == 1.0
    assert metrics[0].trained_tokens == sum(13 + 2 * index for index in range(8))


def test_load_and_evictions_change_no_bit_of_it(model, pairs, preferred, tmp_path) -> None:
    spec, metrics = preferred
    local = world.make_engine(model)
    again = msgspec.structs.replace(spec, checkpoint_dir=str(tmp_path / "again"))
    world.submit(local, again)
    sampling = world.SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
    for index in range(4):
        local.add(f"r{index}", [(7 * i + index) % 90 + 2 for i in range(30)], sampling)
    taken = 0
    for step in range(290):
        held = [s for s in local.engine.scheduler.training.sequences if s.extent is not None and not s.done]
        if held and step % 9 == 0:
            gone = local.engine.scheduler.training.evict_one()
            local.engine.jobs.prepare(StepPlan(evicted=gone))
            taken += len(gone)
        local.engine.step()
    assert taken > 0
    world.finish(local, again.job_id)
    local.run_until(lambda: not local.engine.scheduler.has_requests, 5000)
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert [(n.loss, n.accuracy) for n in told(local)] == [(n.loss, n.accuracy) for n in metrics]
    assert world.pool_is_empty(local)


def test_one_that_goes_on_from_an_adapter_is_compared_to_that(model, pairs, preferred, tmp_path) -> None:
    """trl#1340: the reference is the adapter's frozen start; and it is still after a restart."""
    start = str(max(Path(preferred[0].checkpoint_dir).iterdir()))
    settings = {"n_epochs": 4, "batch_size": 8, "learning_rate": 2e-2, "checkpoint_steps": 2}
    spec = job(pairs, tmp_path, "dpo", init_path=start, **settings)
    metrics = train(model, spec)
    assert metrics[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1].loss < metrics[0].loss - 0.01
    killed = msgspec.structs.replace(spec, checkpoint_dir=str(tmp_path / "killed"))
    first, second = world.make_engine(model), world.make_engine(model)
    world.submit(first, killed)
    first.run_until(lambda: len(told(first)) == 3, 5000)
    world.submit(second, killed)
    world.finish(second, killed.job_id)
    assert world.same_bits(world.final_adapter(killed), world.final_adapter(spec))
    assert [n.loss for n in told(second)] == [n.loss for n in metrics]


def test_preferences_are_validated_against_the_same_reference(model, pairs, preferred, tmp_path) -> None:
    start = str(max(Path(preferred[0].checkpoint_dir).iterdir()))
    spec = job(pairs, tmp_path, "dpo", init_path=start, n_epochs=2, batch_size=8, learning_rate=2e-2)
    spec = msgspec.structs.replace(spec, validation_path=str(pairs))
    first, second = train(model, spec)
    # With all pairs in a step, the validation loss after it is the training loss of the next.
    assert first.valid_loss == pytest.approx(second.loss, rel=1e-9)
    assert first.valid_accuracy == second.accuracy and second.valid_loss < first.valid_loss


def test_a_scoring_pass_counts_as_forward_tokens_alone(model, pairs, tmp_path, monkeypatch) -> None:
    local, counts = world.make_engine(model), []
    take = local.engine.jobs.take_token_counts
    monkeypatch.setattr(local.engine.jobs, "take_token_counts", lambda: counts.append(take()) or counts[-1])
    spec = job(pairs, tmp_path, "dpo", n_epochs=1, batch_size=8)
    world.submit(local, msgspec.structs.replace(spec, validation_path=str(pairs)))
    world.finish(local, "ftjob-1")
    (step,) = told(local)
    # The reference and the adapter over the step's tokens, then both over the validation set's.
    local.engine.jobs.take_token_counts()
    computed = step.tokens - step.shared_tokens  # a pair reads its prompt once
    assert 0 < step.shared_tokens
    assert tuple(map(sum, zip(*counts, strict=True))) == (4 * computed, computed)


def test_rows_are_taken_for_adapter_and_reference_or_for_none(model, pairs, preferred, tmp_path) -> None:
    start = str(max(Path(preferred[0].checkpoint_dir).iterdir()))
    local = world.make_engine(model)
    local.engine.slots.max_adapters = 2
    world.submit(local, job(pairs, tmp_path, "dpo", n_epochs=2))
    world.submit(local, job(pairs, tmp_path, "dpo", "ftjob-2", init_path=start, n_epochs=1))
    assert local.engine.slots.keys == ["ftjob-1"]
    world.finish(local, "ftjob-1")
    assert local.engine.slots.keys == ["ftjob-2", "ftjob-2/start"]
    world.finish(local, "ftjob-2")
    assert local.engine.slots.keys == ["ftjob-2"] and world.rows_are_idle(local)


def test_every_setting_of_the_loss_has_its_effect(model, data, tmp_path) -> None:
    changes = {
        "plain": ("supervised", {}),
        "smoothed": ("supervised", {"label_smoothing": 0.3}),
        "held": ("supervised", {"kl_coef": 3.0}),
        "dft": ("dft", {}),
        "dft-held": ("dft", {"kl_coef": 3.0}),
    }
    found = {}
    for name, (method, settings) in changes.items():
        spec = job(data, tmp_path / name, method, n_epochs=1, warmup_steps=0, **settings)
        metrics = train(model, spec)
        assert all(0.0 <= n.accuracy <= 1.0 for n in metrics)
        found[name] = metrics
    first = {name: metrics[0].loss for name, metrics in found.items()}
    assert first["held"] == first["plain"] and first["dft-held"] == first["dft"], "it starts at the base"
    assert first["smoothed"] != first["plain"] and 0.0 < first["dft"] < first["plain"]
    assert len({metrics[-1].loss for metrics in found.values()}) == 5


def test_a_method_and_data_of_another_kind_fail_by_name(model, data, pairs, tmp_path) -> None:
    local = world.make_engine(model)
    for index, (method, where, word) in enumerate(
        [("dpo", data, "preferences"), ("supervised", pairs, "dpo"), ("kto", data, "kto")]
    ):
        world.submit(local, job(where, tmp_path, method, f"ftjob-{index}"))
        status = [s for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == f"ftjob-{index}"][-1]
        assert status.status == "failed" and word in status.message
    mixed = msgspec.structs.replace(job(data, tmp_path, "dft", "ftjob-9"), validation_path=str(pairs))
    world.submit(local, mixed)
    assert world.status_of(local, "ftjob-9") == "failed"
    assert len(local.engine.slots) == 0
