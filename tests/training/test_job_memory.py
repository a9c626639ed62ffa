"""What a job will hold is known before it starts; who doesn't fit waits and is told why."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from coserve.config import DEMO_MODEL_DIR
from coserve.engine import engine as engine_module
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.engine.memory_limit import memory_for_jobs, memory_limit
from coserve.models.config import ModelConfig
from coserve.training.batching import BatchPlan
from coserve.training.dataset import TokenDataset
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.job_memory import job_memory, memory_of
from coserve.training.optimizer import make_optimizer
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world

MODEL = ModelConfig.from_dir(DEMO_MODEL_DIR)


@pytest.mark.parametrize(
    "training",
    [
        TrainingSpec(),
        TrainingSpec(optimizer="adamw_8bit"),
        TrainingSpec(optimizer="sgd"),
        TrainingSpec(optimizer="sgd", momentum=0.0),
    ],
    ids=lambda spec: f"{spec.optimizer}-{spec.momentum}",
)
@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(r=16),
        LoraSpec(r=3, rank_pattern={"v_proj": 40}),
        LoraSpec(r=8, freeze_a=True),
        LoraSpec(r=4, target_modules=("q_proj", "lm_head"), layers_to_transform=(1,)),
    ],
    ids=("plain", "pattern", "frozen", "head"),
)
def test_the_bytes_are_those_that_a_job_holds(lora: LoraSpec, training: TrainingSpec) -> None:
    expected = job_memory(lora, training, MODEL)
    adapter = TrainableAdapter(lora, MODEL, seed=0)
    optimizer = make_optimizer(adapter, training)
    adapter.keep_gradients()
    assert adapter.nbytes == expected.masters + expected.gradients
    assert optimizer.nbytes == expected.moments
    assert expected.total == adapter.nbytes + optimizer.nbytes


@pytest.mark.parametrize("packing", [False, True])
def test_the_plan_of_the_data_counts_too(tmp_path: Path, packing: bool) -> None:
    data = world.make_data(tmp_path / "data", examples=200)
    spec = replace(world.make_job(data, tmp_path), training=TrainingSpec(packing=packing, max_length=400))
    plan = BatchPlan(TokenDataset.open(data), spec.training, seed=0)
    plan.step(1)
    assert plan.nbytes <= memory_of(spec, MODEL).data <= 2 * plan.nbytes + 64


def engine_with(monkeypatch: pytest.MonkeyPatch, model: Path, memory: int) -> LocalEngine:
    monkeypatch.setattr(engine_module, "memory_for_jobs", lambda device, promised: memory)
    return world.make_engine(model)


def told(local: LocalEngine, job_id: str) -> list[tuple[str, str]]:
    return [(s.status, s.message) for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == job_id]


def test_a_job_waits_for_the_memory_of_another_and_says_so(model, data, tmp_path, monkeypatch) -> None:
    first, second = (world.make_job(data, tmp_path, f"ftjob-{n}", n_epochs=1) for n in (1, 2))
    need = memory_of(first, ModelConfig.from_dir(model)).total
    local = engine_with(monkeypatch, model, need + need // 2)
    world.submit(local, first)
    world.submit(local, second)
    ((status, reason),) = told(local, "ftjob-2")
    assert status == "queued"
    assert f"take {need} bytes" in reason and f"{need // 2} of the {need + need // 2}" in reason
    world.finish(local, "ftjob-1", "ftjob-2")
    assert [status for status, _ in told(local, "ftjob-2")] == ["queued", "running", "succeeded"]
    assert local.engine.jobs.optimizer_bytes == 0


def test_a_job_that_can_never_fit_waits_and_lets_the_others_by(model, data, tmp_path, monkeypatch) -> None:
    small = world.make_job(data, tmp_path, n_epochs=1)
    large = replace(small, job_id="ftjob-large", lora=LoraSpec(r=8))
    config = ModelConfig.from_dir(model)
    local = engine_with(monkeypatch, model, memory_of(small, config).total)
    world.submit(local, large)
    world.submit(local, small)
    world.finish(local, small.job_id)
    ((status, reason),) = told(local, "ftjob-large")
    assert status == "queued" and f"need {memory_of(large, config).total} bytes" in reason
    assert "adamw_8bit" in reason and "--kv-cache-memory-bytes" in reason
    reply = local.call(lambda i: m.ControlJob(call_id=i, job_id="ftjob-large", action="cancel"))
    assert reply.error is None and told(local, "ftjob-large")[-1][0] == "cancelled"


def test_a_job_that_waits_for_rows_says_so_once(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    local.engine.slots.max_adapters = 1
    for name in ("ftjob-1", "ftjob-2"):
        world.submit(local, world.make_job(data, tmp_path, name, n_epochs=1))
    world.finish(local, "ftjob-1", "ftjob-2")
    reasons = [reason for status, reason in told(local, "ftjob-2") if status == "queued"]
    assert len(reasons) == 1 and "4 adapter rows" in reasons[0] and "--max-loras" in reasons[0]


def test_the_ledger_has_what_a_job_was_expected_to_hold(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    local.run_until(lambda: len(world.progress(local, spec.job_id)) == 2, 5000)
    expected = memory_of(spec, local.engine.model_config)
    owners = local.engine.stats.snapshot(0).memory_bytes
    kept = expected.gradients // 2  # nobody took memory from the job
    assert owners["optimizer"] == expected.masters + expected.gradients - kept + expected.moments


# ------------------------------------------------------------------ the limit


def test_the_least_limit_of_the_cgroups_counts(tmp_path: Path) -> None:
    own, cgroups = tmp_path / "own", tmp_path / "cgroups"
    (cgroups / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    machine = memory_limit(cgroups, own)
    assert machine > 1 << 20
    (cgroups / "a" / "b" / "memory.max").write_text("max\n")
    (cgroups / "a" / "memory.max").write_text("1048576\n")
    assert memory_limit(cgroups, own) == 1 << 20
    (cgroups / "memory.max").write_text("4096\n")
    assert memory_limit(cgroups, own) == 4096


def test_cgroups_of_the_first_version_have_theirs(tmp_path: Path) -> None:
    own, cgroups = tmp_path / "own", tmp_path / "cgroups"
    (cgroups / "memory" / "a").mkdir(parents=True)
    own.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n")
    (cgroups / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    machine = memory_limit(cgroups, own)
    assert machine < 1 << 60
    (cgroups / "memory" / "a" / "memory.limit_in_bytes").write_text("65536\n")
    assert memory_limit(cgroups, own) == 65536


def test_jobs_have_what_is_promised_to_nobody(model) -> None:
    device = world.make_engine(model).engine.kv.device
    left = memory_for_jobs(device, 0)
    assert 0 < left < memory_limit()
    assert memory_for_jobs(device, memory_limit()) == 0
