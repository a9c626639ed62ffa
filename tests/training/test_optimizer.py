"""Whole optimizer steps against PEFT with torch's AdamW and transformers' linear schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from coserve.errors import FailedPrecondition, InvalidRequest
from coserve.models.config import ModelConfig
from coserve.models.loader import load_model
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.optimizer import AdamW, global_norm
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import Trainer, make_peft, make_samples, peft_loss

STEPS = 5
SPEC = TrainingSpec(learning_rate=2e-2, warmup_steps=1, weight_decay=0.05, max_grad_norm=0.05)
LORA = LoraSpec(r=4, lora_alpha=12.0, rank_pattern={"o_proj": 2})
BATCHES = [make_samples((19, 40, 7, 28), 97, seed=step) for step in range(STEPS)]


def train(folder: Path, microbatch_tokens: int) -> tuple[list[float], list[float], torch.Tensor]:
    """(losses, gradient norms, masters) of `STEPS` optimizer steps."""
    decoder = load_model(folder, "cpu", torch.float32)
    adapter = TrainableAdapter(LORA, decoder.config, seed=4)
    trainer = Trainer.make(decoder, adapter)
    optimizer, schedule = AdamW(adapter, SPEC), Schedule(SPEC, STEPS)
    losses, norms = [], []
    for step, samples in enumerate(BATCHES, 1):
        losses.append(trainer.gradients(samples, microbatch_tokens=microbatch_tokens))
        norms.append(optimizer.step(schedule.learning_rate(step)))
        adapter.write_rows(trainer.pool, trainer.rows)
    return losses, norms, adapter.parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(make_reference("llama"), tmp_path_factory.mktemp("llama"))


def test_five_steps_equal_those_of_peft_and_torch(folder: Path) -> None:
    losses, norms, masters = train(folder, 1 << 30)
    fresh = TrainableAdapter(LORA, ModelConfig.from_dir(folder), seed=4)
    model = make_peft(make_reference("llama"), fresh, torch.float64, torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SPEC.learning_rate, weight_decay=SPEC.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, STEPS)
    for step, samples in enumerate(BATCHES):
        loss = peft_loss(model, samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, SPEC.max_grad_norm)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert norms[step] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    state = {k.replace(".default", ""): v for k, v in model.named_parameters() if "lora_" in k}
    fresh.load({k: v.detach() for k, v in state.items()})
    assert losses[-1] != losses[0]
    # Adam turns the sign of a gradient near zero into a whole step, so single entries may stray further.
    assert (fresh.parameters - masters).norm() <= 2e-5 * masters.norm()


def test_how_the_batch_is_split_into_microbatches_does_not_matter(folder: Path) -> None:
    losses, norms, masters = train(folder, 1 << 30)
    for limit in (1, 50):
        split_losses, split_norms, split_masters = train(folder, limit)
        assert split_losses == pytest.approx(losses, rel=1e-5)
        assert split_norms == pytest.approx(norms, rel=1e-4)
        assert (split_masters - masters).norm() <= 2e-5 * masters.norm()


def make_adapter() -> TrainableAdapter:
    config = ModelConfig("llama", 17, 8, 12, 1, 2, 1, 4)
    return TrainableAdapter(LoraSpec(r=2), config, seed=0)


def test_norm_is_exact_and_clipping_scales_to_it() -> None:
    adapter = make_adapter()
    adapter.gradients.fill_(2.0)
    count = len(adapter.gradients)
    assert global_norm(adapter.gradients) == pytest.approx(2.0 * count**0.5, rel=1e-15)
    optimizer = AdamW(adapter, TrainingSpec(max_grad_norm=1.0))
    assert optimizer.step(1e-3) == pytest.approx(2.0 * count**0.5, rel=1e-15)
    clipped = 2.0 / (2.0 * count**0.5)
    assert optimizer.exp_avg[0].item() == pytest.approx(0.1 * clipped, rel=1e-5)


def test_zero_switches_clipping_off() -> None:
    adapter = make_adapter()
    adapter.gradients.fill_(2.0)
    optimizer = AdamW(adapter, TrainingSpec(max_grad_norm=0.0))
    optimizer.step(1e-3)
    assert optimizer.exp_avg[0].item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_job_before_it_harms(bad: float) -> None:
    adapter = make_adapter()
    optimizer = AdamW(adapter, TrainingSpec())
    before = adapter.parameters.clone()
    adapter.gradients[3] = bad
    with pytest.raises(FailedPrecondition, match="step 1") as caught:
        optimizer.step(1e-3)
    assert caught.value.code == "training_diverged"
    assert torch.equal(adapter.parameters, before)
    assert optimizer.step_count == 0


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'sgd'"):
        AdamW(make_adapter(), TrainingSpec(optimizer="sgd"))
