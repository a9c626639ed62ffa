"""I6: whenever it is killed, a job resumes from its newest whole checkpoint and replays to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coserve.engine import messages as m

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
