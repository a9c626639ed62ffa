"""Faults that trainers have had in stopping and going on, one test each; the docstring names whose."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from coserve.models.loader import load_model
from coserve.training import checkpoint
from coserve.training.job import JobSpec
from coserve.training.optimizer import make_optimizer
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world


def make_job(data: Path, folder: Path, **training: object) -> JobSpec:
    """Shuffled data, dropout, a schedule that never stands still."""
    spec = world.make_job(data, folder, lr_scheduler_type="cosine", warmup_steps=2, **training)
    return msgspec.structs.replace(spec, lora=msgspec.structs.replace(spec.lora, lora_dropout=0.2))


def run(model: Path, spec: JobSpec) -> list[tuple[int, float, float]]:
    """To its end; what it told of its steps."""
    local = world.make_engine(model)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.progress(local, spec.job_id)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    spec = make_job(data, tmp_path_factory.mktemp("whole"))
    figures = run(model, spec)
    return world.final_adapter(spec), figures


@pytest.mark.parametrize("saved,stopped", [(2, 2), (2, 3), (3, 3), (3, 5)])
def test_interrupted_equals_uninterrupted(model, data, tmp_path, whole, saved: int, stopped: int) -> None:
    """transformers#17032, transformers#46628, accelerate#4071, accelerate#2016, miles#2661: cursor, order,
    dropout or learning rate were others after a resume, within an epoch (3 steps) or at its end.
    transformers#29383, transformers#24274, lerobot#3459: the first loss afterwards was that of an adapter
    loaded twice or never."""
    spec = make_job(data, tmp_path, checkpoint_steps=saved)
    local = world.make_engine(model)
    world.submit(local, spec)
    local.run_until(lambda: len(world.progress(local, spec.job_id)) == stopped, 5000)
    world.settle(local)
    kept = stopped // saved * saved
    assert checkpoint.newest_whole(spec.checkpoint_dir, spec).step == kept
    figures = run(model, spec)
    assert figures[-6 + kept :] == whole[1][kept:]
    assert world.same_bits(world.final_adapter(spec), whole[0])


def test_weights_alone_start_with_new_moments(model, data, tmp_path) -> None:
    """SkyRL#1993, SkyRL#2071: loading weights only kept the old moments. A checkpoint as a start gives what
    its adapter files alone give; as the job's own it restores them."""
    first = make_job(data, tmp_path / "first", n_epochs=1)
    run(model, first)
    found = checkpoint.newest_whole(first.checkpoint_dir, first)
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(found.path / name, plain / name)
    results = []
    for name, start in (("a", found.path), ("b", plain)):
        spec = msgspec.structs.replace(make_job(data, tmp_path / name), init_path=str(start))
        results.append((run(model, spec), world.final_adapter(spec)))
    assert results[0][0] == results[1][0] and results[0][0][0][0] == 1
    assert world.same_bits(results[0][1], results[1][1])

    decoder = load_model(model, "cpu", torch.float32)
    adapter = TrainableAdapter(first.lora, decoder.config, seed=9)
    optimizer = make_optimizer(adapter, first.training)
    adapter.start_from(found.path, decoder.config)
    assert not any(moment.any() for moment in optimizer.state().values()) and optimizer.step_count == 0
    found.load_into(adapter, optimizer)
    assert all(moment.any() for moment in optimizer.state().values()) and optimizer.step_count == 3
    assert load_file(found.path / "optimizer.safetensors").keys() == optimizer.state().keys()
