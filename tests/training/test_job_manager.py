"""Jobs in a real engine: their states, their faults, and that one's trouble is nobody else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.layers.pieces import Pieces
from coserve.training.backward import MicrobatchBackward
from coserve.training.dataset import TokenDataset
from coserve.training.job import StepMetrics
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import CrossEntropy, LossSums
from coserve.training.running_job import RunningJob
from tests.invariants import world


def control(local: LocalEngine, job_id: str, action: str) -> m.Reply:
    return local.call(lambda i: m.ControlJob(call_id=i, job_id=job_id, action=action))


def last_status(local: LocalEngine, job_id: str) -> m.JobStatus:
    return [s for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == job_id][-1]


def messages(local: LocalEngine, job_id: str) -> list[str]:
    return [s.text for s in local.sent if isinstance(s, m.JobMessage) and s.job_id == job_id]


def poison(monkeypatch: pytest.MonkeyPatch, step: int, times: int, where: str) -> list[int]:
    """Make an optimizer step come out as NaN so many times: its "loss" or its "gradient"."""
    struck: list[int] = []

    def commit(self: RunningJob) -> Pieces[StepMetrics]:
        if self.step + 1 == step and len(struck) < times:
            struck.append(step)
            if where == "loss":
                last = list(self.microbatches.values())[-1]
                last.logprobs_T[last.trained_rows[0]] = float("nan")
            else:
                self._adapter.gradients[5] = float("inf")
        return plain(self)

    plain = RunningJob._commit_step
    monkeypatch.setattr(RunningJob, "_commit_step", commit)
    return struck


@pytest.fixture(scope="module")
def undisturbed(model, data, tmp_path_factory):
    local, spec = world.make_engine(model), world.make_job(data, tmp_path_factory.mktemp("undisturbed"))
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.final_adapter(spec), world.progress(local, spec.job_id)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_fails_once_is_run_again_and_leaves_no_trace(
    model, data, tmp_path, monkeypatch, undisturbed, where
) -> None:
    struck = poison(monkeypatch, 3, 1, where)
    local, spec = world.make_engine(model), world.make_job(data, tmp_path)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    assert struck == [3]
    (text,) = messages(local, spec.job_id)
    assert "Step 3" in text and where in text and "once more" in text
    assert world.same_bits(world.final_adapter(spec), undisturbed[0])
    assert world.progress(local, spec.job_id) == undisturbed[1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_fails_twice_ends_the_job_and_keeps_its_checkpoint(
    model, data, tmp_path, monkeypatch, undisturbed, where
) -> None:
    poison(monkeypatch, 4, 2, where)
    local, spec = world.make_engine(model), world.make_job(data, tmp_path)
    world.submit(local, spec)
    local.run_until(lambda: last_status(local, spec.job_id).status == "failed", 5000)
    failed = last_status(local, spec.job_id)
    assert failed.error_code == "training_diverged"
    assert "step 4" in failed.message and where in failed.message and "checkpoint of step 2" in failed.message
    assert ("example" in failed.message) == (where == "loss")
    assert [step for step, _, _ in world.progress(local, spec.job_id)] == [1, 2, 3]
    assert world.pool_is_empty(local)
    monkeypatch.undo()  # whatever it was is gone: the job goes on from where it was whole
    again = world.make_engine(model)
    world.submit(again, spec)
    world.finish(again, spec.job_id)
    assert world.same_bits(world.final_adapter(spec), undisturbed[0])


def test_an_update_that_overflows_the_weights_is_never_saved(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path, weight_decay=1e300, warmup_steps=0, checkpoint_steps=1)
    world.submit(local, spec)
    local.run_until(lambda: last_status(local, spec.job_id).status == "failed", 5000)
    assert "overflows the weights" in last_status(local, spec.job_id).message
    assert not list(Path(spec.checkpoint_dir).glob("step-*"))


def test_an_exploding_loss_is_told_and_the_job_goes_on(model, data, tmp_path, monkeypatch) -> None:
    plain = CrossEntropy.sums

    def sums(self: CrossEntropy, microbatch: Microbatch) -> LossSums:
        found = plain(self, microbatch)
        return replace(found, loss=found.loss * (9.0 if job.step == 2 else 1.0))

    monkeypatch.setattr(CrossEntropy, "sums", sums)
    local, spec = world.make_engine(model), world.make_job(data, tmp_path)
    world.submit(local, spec)
    job = local.engine.jobs._jobs[spec.job_id]
    world.finish(local, spec.job_id)
    (text,) = messages(local, spec.job_id)
    assert "Step 3: the loss is" in text


def test_a_diverging_job_fails_by_name_and_touches_no_other(model, data, tmp_path) -> None:
    alone = world.make_engine(model)
    good = world.make_job(data, tmp_path / "alone")
    world.submit(alone, good)
    world.finish(alone, good.job_id)
    local = world.make_engine(model)
    again = world.make_job(data, tmp_path / "beside")
    world.submit(local, world.make_job(data, tmp_path, "ftjob-bad", learning_rate=1e30, max_grad_norm=0.0))
    world.submit(local, again)
    world.finish(local, again.job_id)
    local.run_until(lambda: last_status(local, "ftjob-bad").status == "failed", 5000)
    failed = last_status(local, "ftjob-bad")
    assert failed.error_code == "training_diverged" and "learning rate" in failed.message
    assert messages(local, again.job_id) == []
    assert world.same_bits(world.final_adapter(again), world.final_adapter(good))
    assert world.pool_is_empty(local)


def test_a_fault_inside_a_unit_fails_the_job_alone(model, data, tmp_path, monkeypatch) -> None:
    local = world.make_engine(model)
    world.submit(local, world.make_job(data, tmp_path))

    def broken(self: MicrobatchBackward, length: int, stop: object) -> None:
        raise RuntimeError("a kernel's fault")

    monkeypatch.setattr(MicrobatchBackward, "run_next", broken)
    local.run_until(lambda: last_status(local, "ftjob-1").status == "failed", 5000)
    assert last_status(local, "ftjob-1").error_code == "internal_error"
    assert "kernel" not in last_status(local, "ftjob-1").message
    assert local.generate([3, 4, 5], world.GREEDY)
    assert world.pool_is_empty(local)


def test_a_microbatch_that_never_fits_is_refused_with_the_way_out(model, data, tmp_path) -> None:
    local = world.make_engine(model, max_model_len=128, kv_cache_memory_bytes=20 * 4096)
    world.submit(local, world.make_job(data, tmp_path))
    failed = last_status(local, "ftjob-1")
    assert failed.status == "failed" and "--kv-cache-memory-bytes" in failed.message
    assert (failed.error_code, failed.error_param) == ("out_of_memory", "training.max_length")


def test_a_job_with_one_example_too_long_is_refused_before_it_starts(model, tmp_path) -> None:
    """Whatever the step that it would come in; the message has what it needs and what there is."""
    rows = [([3] * 20, [3] * 20)] * 30 + [([4] * 400, [4] * 400)]
    TokenDataset.write(tmp_path / "data", rows)
    spec = world.make_job(tmp_path / "data", tmp_path, batch_size=1, shuffle=False)
    ample = world.make_engine(model)
    world.submit(ample, spec)
    queue = ample.engine.scheduler.training
    ample.run_until(lambda: any(s.num_tokens == 400 for s in queue.sequences), 5000)
    slabs, slab = queue.sequences[0].level_slabs[0], ample.engine.kv.slab_bytes
    tight = world.make_engine(model, max_model_len=128, kv_cache_memory_bytes=(slabs - 1) * slab)
    world.submit(tight, world.make_job(tmp_path / "data", tmp_path, "ftjob-2", batch_size=1, shuffle=False))
    (told,) = [news for news in tight.sent if isinstance(news, m.JobStatus)]
    assert told.status == "failed" and told.error_code == "out_of_memory"
    assert f"400 tokens in training need {slabs * slab} bytes" in told.message
    assert f"which has {(slabs - 1) * slab};" in told.message
    assert "ftjob-2" not in tight.engine.slots and world.pool_is_empty(tight)


def test_pause_and_resume(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    local.run_until(lambda: len(world.progress(local, spec.job_id)) == 2, 5000)
    assert control(local, spec.job_id, "resume").error.code == "failed_precondition"
    assert control(local, spec.job_id, "pause").error is None
    assert last_status(local, spec.job_id).status == "paused"
    assert not local.engine.jobs.has_work and world.pool_is_empty(local)
    assert control(local, spec.job_id, "pause").error.code == "failed_precondition"
    assert control(local, spec.job_id, "resume").error is None
    world.finish(local, spec.job_id)
    assert [step for step, _, _ in world.progress(local, spec.job_id)] == [1, 2, 3, 4, 5, 6]


def test_unknown_and_doubled_jobs_are_refused(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    assert control(local, "ftjob-none", "cancel").error.code == "not_found"
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    assert "running already" in local.call(lambda i: m.SubmitJob(call_id=i, spec=spec)).error.message


def test_missing_data_fails_the_job_and_frees_its_rows(model, tmp_path) -> None:
    local = world.make_engine(model)
    world.submit(local, world.make_job(tmp_path / "nothing", tmp_path))
    assert last_status(local, "ftjob-1").status == "failed"
    assert len(local.engine.slots) == 0


def test_more_jobs_than_rows_take_turns(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    local.engine.slots.max_adapters = 2
    names = [f"ftjob-{index}" for index in range(4)]
    for name in names:
        world.submit(local, world.make_job(data, tmp_path, name, n_epochs=1))
    world.finish(local, *names)
    adapters = [world.final_adapter(world.make_job(data, tmp_path, name)) for name in names]
    assert all(world.same_bits(adapters[0], other) for other in adapters[1:])


def test_starting_from_an_adapter_starts_from_its_weights(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    first = world.make_job(data, tmp_path)
    world.submit(local, first)
    world.finish(local, first.job_id)
    newest = max(Path(first.checkpoint_dir).iterdir())
    second = world.make_job(data, tmp_path, "ftjob-2", learning_rate=1e-9, n_epochs=1)
    second = m.msgspec.structs.replace(second, init_path=str(newest))
    world.submit(local, second)
    world.finish(local, second.job_id)
    before, after = world.final_adapter(first), world.final_adapter(second)
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)


def test_a_job_that_waits_for_rows_can_be_paused_and_cancelled(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    local.engine.slots.max_adapters = 1
    for name in ("ftjob-1", "ftjob-2", "ftjob-3"):
        world.submit(local, world.make_job(data, tmp_path, name, n_epochs=1))
    assert control(local, "ftjob-2", "pause").error is None
    assert control(local, "ftjob-2", "pause").error.code == "failed_precondition"
    assert control(local, "ftjob-3", "cancel").error is None
    world.finish(local, "ftjob-1")
    assert last_status(local, "ftjob-2").status == "paused"
    assert last_status(local, "ftjob-3").status == "cancelled"
    assert control(local, "ftjob-2", "resume").error is None
    world.finish(local, "ftjob-2")


def test_a_job_submitted_paused_waits(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = m.msgspec.structs.replace(world.make_job(data, tmp_path, n_epochs=1), paused=True)
    world.submit(local, spec)
    assert last_status(local, spec.job_id).status == "paused" and not local.engine.jobs.has_work
    assert control(local, spec.job_id, "resume").error is None
    world.finish(local, spec.job_id)
