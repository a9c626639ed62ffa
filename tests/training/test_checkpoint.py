"""Checkpoints: whole or not at all, and resumed to the same bits (I6)."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from coserve.errors import FailedPrecondition
from coserve.models.config import ModelConfig
from coserve.models.loader import random_weights
from coserve.training import checkpoint
from coserve.training.early_stopping import EvaluationState
from coserve.training.job import JobSpec, LoraSpec, StepMetrics, TrainingSpec
from coserve.training.optimizer import AdamW
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.training_harness import Trainer, make_samples

CONFIG = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8)
SPEC = JobSpec(
    job_id="ftjob-1",
    data_path="/data",
    checkpoint_dir="/checkpoints",
    seed=5,
    lora=LoraSpec(r=3),
    training=TrainingSpec(learning_rate=1e-2, warmup_steps=1),
)
STEPS = 6


class Run:
    """A job without scheduler: one packed batch a step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.adapter = TrainableAdapter(SPEC.lora, CONFIG, SPEC.seed)
        self.optimizer = AdamW(self.adapter, SPEC.training)
        self.schedule = Schedule(SPEC.training, STEPS)
        self.trainer = Trainer.make(random_weights(CONFIG, 0, torch.float32), self.adapter)
        self.step, self.events, self.evaluation = 0, [], EvaluationState()
        found = checkpoint.newest_whole(directory, SPEC)
        if found is not None:
            found.load_into(self.adapter, self.optimizer)
            self.adapter.write_rows(self.trainer.pool, self.trainer.rows)
            self.step = found.step

    def train(self, until: int) -> list[tuple[float, float]]:
        figures = []
        while self.step < until:
            self.step += 1
            loss = self.trainer.gradients(make_samples((20, 31), 61, seed=self.step), backward_window=64)
            norm = self.optimizer.step(self.schedule.learning_rate(self.step))
            self.adapter.write_rows(self.trainer.pool, self.trainer.rows)
            figures.append((loss, norm))
            self.events.append(event(self.step, loss, norm))
        return figures

    def save(self) -> Path:
        path = checkpoint.writing(
            self.directory, self.step, self.adapter, self.optimizer, self.events, SPEC, self.evaluation
        )()
        self.events = []
        return path


def event(step: int, loss: float = 1.0, norm: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        total_steps=STEPS,
        epoch=step / STEPS,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=norm,
        trained_tokens=10,
        tokens=20,
    )


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    figures = whole.train(STEPS)
    first = Run(tmp_path / "cut")
    early = first.train(3)
    first.save()
    first.train(5)  # lost with the process: only the checkpoint counts
    second = Run(tmp_path / "cut")
    assert second.step == 3
    assert early + second.train(STEPS) == figures
    assert torch.equal(second.adapter.parameters, whole.adapter.parameters)
    assert torch.equal(second.optimizer.exp_avg, whole.optimizer.exp_avg)
    assert torch.equal(second.optimizer.exp_avg_sq, whole.optimizer.exp_avg_sq)


def test_events_come_back_exactly(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    kept = list(run.events)
    run.save()
    found = checkpoint.newest_whole(tmp_path, SPEC)
    assert found is not None
    assert found.events == kept


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_broken_checkpoint_is_passed_over(name: str, damage: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step = 1
    run.save()
    run.step = 2
    file = run.save() / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 3
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    found = checkpoint.newest_whole(tmp_path, SPEC)
    assert found is not None
    assert found.step == 1


def test_the_last_three_are_kept_and_leavings_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "step-000009.tmp").mkdir()
    for step in (1, 2, 10, 11):
        run.step = step
        run.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010", "step-000011"]


def test_the_same_step_twice_keeps_the_first_unless_it_is_broken(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step, run.events = 4, [event(4)]
    path = run.save()
    before = (path / "state.json").read_bytes()
    run.events = [event(4, loss=2.0)]
    assert run.save() == path
    assert (path / "state.json").read_bytes() == before
    (path / "state.json").write_text("{}")
    run.events = [event(4, loss=2.0)]
    run.save()
    assert json.loads((path / "state.json").read_text())["events"][0]["loss"] == 2.0


def test_none_in_an_empty_or_absent_directory(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path, SPEC) is None
    assert checkpoint.newest_whole(tmp_path / "absent", SPEC) is None


def test_other_settings_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step = 1
    run.save()
    with pytest.raises(FailedPrecondition, match="other settings"):
        checkpoint.newest_whole(tmp_path, msgspec.structs.replace(SPEC, seed=6))
    moved = msgspec.structs.replace(SPEC, paused=True, priority=3, data_path="/elsewhere")
    assert checkpoint.newest_whole(tmp_path, moved) is not None
