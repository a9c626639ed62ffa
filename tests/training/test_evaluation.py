"""Validation in a real engine: what is scored and when, what it decides, and that it changes no weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coserve.engine import messages as m
from coserve.training.dataset import TokenDataset
from tests.invariants import world
from tests.parity.training_harness import peft_loss


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy examples: two groups of microbatches."""
    return world.make_data(tmp_path_factory.mktemp("validation") / "data", examples=70, seed=9)


def run(model: Path, spec, **settings):
    local = world.make_engine(model, **settings)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return local


def texts(local, job_id: str, level: str) -> list[str]:
    said = [s for s in local.sent if isinstance(s, m.JobMessage) and s.job_id == job_id]
    return [s.text for s in said if s.level == level]


def test_the_scores_are_those_of_peft_on_the_whole_set(model, data, validation, tmp_path) -> None:
    spec = world.make_job(data, tmp_path, validation=validation, eval_steps=4)
    local = run(model, spec)
    ((first, _, _), (last, loss, accuracy)) = world.validations(local, spec.job_id)
    assert (first, last) == (4, 6)
    dataset = TokenDataset.open(validation)
    samples = [tuple(part.astype("int64") for part in dataset[i]) for i in range(70)]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    newest = max(Path(spec.checkpoint_dir).iterdir())
    peft = PeftModel.from_pretrained(base, newest, autocast_adapter_dtype=False).double()
    assert loss == pytest.approx(peft_loss(peft, samples).item(), rel=1e-5)
    right = total = 0
    for ids, labels in samples:
        logits, wanted = peft(torch.tensor(ids)[None]).logits[0, :-1], torch.tensor(labels)[1:]
        right += int((logits.argmax(-1) == wanted)[wanted >= 0].sum())
        total += int((wanted >= 0).sum())
    assert accuracy == pytest.approx(right / total)


@pytest.mark.parametrize(("eval_steps", "steps"), [(0, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6])])
def test_when_it_is_scored(model, data, validation, tmp_path, eval_steps, steps) -> None:
    spec = world.make_job(data, tmp_path, validation=validation, eval_steps=eval_steps)
    local = run(model, spec)
    assert [step for step, _, _ in world.validations(local, spec.job_id)] == steps
    assert [step for step, _, _ in world.progress(local, spec.job_id)] == [1, 2, 3, 4, 5, 6]


def test_scoring_changes_no_bit_of_the_training(model, data, validation, tmp_path) -> None:
    plain, scored = (
        world.make_job(data, tmp_path / "plain"),
        world.make_job(data, tmp_path / "scored", validation=validation, eval_steps=1),
    )
    logs = [world.progress(run(model, spec), spec.job_id) for spec in (plain, scored)]
    assert logs[0] == logs[1]
    assert world.same_bits(world.final_adapter(plain), world.final_adapter(scored))


def test_early_stopping_ends_well_and_publishes_the_best(model, data, validation, tmp_path) -> None:
    """The random labels can be learnt by heart only, so the validation loss rises."""
    spec = world.make_job(
        data, tmp_path, validation=validation, eval_steps=1, n_epochs=30, learning_rate=2e-2,
        early_stopping_patience=4, warmup_steps=0,
    )  # fmt: skip
    local = run(model, spec)
    losses = {step: loss for step, loss, _ in world.validations(local, spec.job_id)}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 4 < 90
    (text,) = texts(local, spec.job_id, "info")
    assert f"step {best + 4}" in text and f"step {best}." in text and "4 evaluations" in text
    folder = Path(spec.checkpoint_dir)
    told = [s.result_path for s in local.sent if isinstance(s, m.JobStatus)][-1]
    assert told == str(folder / f"step-{best:06d}")
    kept = [s for s in local.sent if isinstance(s, m.JobCheckpoint)][-1].kept
    assert kept == sorted(int(p.name[5:]) for p in folder.iterdir()) and best in kept
    # The engine that comes after a crash at the very end says the same.
    again = run(model, spec)
    assert [s.result_path for s in again.sent if isinstance(s, m.JobStatus)][-1] == told


def test_without_early_stopping_the_last_is_published_and_the_best_is_kept(
    model, data, validation, tmp_path
) -> None:
    spec = world.make_job(
        data, tmp_path, validation=validation, eval_steps=1, n_epochs=4, learning_rate=5e-2,
        checkpoint_steps=1, warmup_steps=0,
    )  # fmt: skip
    local = run(model, spec)
    losses = {step: loss for step, loss, _ in world.validations(local, spec.job_id)}
    best = min(losses, key=lambda step: losses[step])
    assert best < 9
    kept = sorted(int(p.name[5:]) for p in Path(spec.checkpoint_dir).iterdir())
    assert kept == [best, 10, 11, 12]
    assert world.same_bits(world.published(local, spec.job_id), world.final_adapter(spec))


def test_a_pause_amid_the_scoring_loses_nothing(model, data, validation, tmp_path) -> None:
    plain = world.make_job(data, tmp_path / "plain", validation=validation, eval_steps=2)
    whole = run(model, plain)
    spec = world.make_job(data, tmp_path / "paused", validation=validation, eval_steps=2)
    local = world.make_engine(model)
    world.submit(local, spec)

    def scoring() -> bool:
        return any("/2/validation/1" in name for name in local.engine.jobs.microbatches)

    local.run_until(scoring, 5000)
    for action in ("pause", "resume"):
        local.call(lambda i, action=action: m.ControlJob(call_id=i, job_id=spec.job_id, action=action))
    world.finish(local, spec.job_id)
    assert world.validations(local, spec.job_id) == world.validations(whole, plain.job_id)
    assert world.progress(local, spec.job_id) == world.progress(whole, plain.job_id)
    assert world.same_bits(world.final_adapter(spec), world.final_adapter(plain))


def test_validation_data_without_trained_tokens_is_refused_with_the_count(model, data, tmp_path) -> None:
    folder = tmp_path / "validation"
    TokenDataset.write(folder, [([5, 6, 7], [-100, 6, 7]), ([5, 6], [5, -100]), ([5], [5])])
    local = world.make_engine(model)
    world.submit(local, world.make_job(data, tmp_path, validation=folder))
    failed = [s for s in local.sent if isinstance(s, m.JobStatus)][-1]
    assert failed.status == "failed" and failed.error_param == "validation_file"
    assert "2 of 3 examples" in failed.message


def test_a_disk_that_refuses_a_checkpoint_fails_its_job_alone(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec, good = world.make_job(data, tmp_path), world.make_job(data, tmp_path, "ftjob-good")
    Path(spec.checkpoint_dir).parent.mkdir(exist_ok=True)
    Path(spec.checkpoint_dir).write_text("a file where the folder should be")
    for job in (spec, good):
        world.submit(local, job)
    world.finish(local, good.job_id)
    failed = [s for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == spec.job_id][-1]
    assert (failed.status, failed.error_code) == ("failed", "checkpoint_failed")
    assert "step 2" in failed.message and load_file(
        Path(good.checkpoint_dir) / "step-000006" / "adapter_model.safetensors"
    )
