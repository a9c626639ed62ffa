"""Whole optimizer steps against PEFT with torch's AdamW and transformers' linear schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from transformers import get_linear_schedule_with_warmup

from coserve.errors import InvalidRequest
from coserve.models.config import ModelConfig
from coserve.models.loader import load_model
from coserve.training.divergence import Diverged
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.optimizer import OPTIMIZERS, AdamW, global_norm, joined, make_optimizer
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import Trainer, make_peft, make_samples, peft_loss

STEPS = 5
SPEC = TrainingSpec(learning_rate=2e-2, warmup_steps=1, weight_decay=0.05, max_grad_norm=0.05)
LORA = LoraSpec(r=4, lora_alpha=12.0, rank_pattern={"o_proj": 2})
BATCHES = [make_samples((19, 40, 7, 28), 97, seed=step) for step in range(STEPS)]


def train(
    folder: Path, microbatch_tokens: int, spec: TrainingSpec = SPEC
) -> tuple[list[float], list[float], torch.Tensor]:
    """(losses, gradient norms, masters) of `STEPS` optimizer steps."""
    decoder = load_model(folder, "cpu", torch.float32)
    adapter = TrainableAdapter(LORA, decoder.config, seed=4)
    trainer = Trainer.make(decoder, adapter)
    optimizer, schedule = make_optimizer(adapter, spec), Schedule(spec, STEPS)
    losses, norms = [], []
    for step, samples in enumerate(BATCHES, 1):
        losses.append(trainer.gradients(samples, microbatch_tokens=microbatch_tokens))
        norms.append(optimizer.step(schedule.learning_rate(step)))
        adapter.write_rows(trainer.pool, trainer.rows)
    return losses, norms, adapter.parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(make_reference("llama"), tmp_path_factory.mktemp("llama"))


def torch_groups(model: torch.nn.Module, spec: TrainingSpec) -> list[dict[str, object]]:
    """LoRA+'s parameter groups of a PEFT model."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {"lora_A": spec.learning_rate, "lora_B": spec.learning_rate * spec.loraplus_lr_ratio}
    return [{"params": [p for name, p in named if kind in name], "lr": rate} for kind, rate in rates.items()]


def torch_optimizer(model: torch.nn.Module, spec: TrainingSpec) -> torch.optim.Optimizer:
    groups = torch_groups(model, spec)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=spec.weight_decay)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loraplus_lr_ratio": 8.0, "learning_rate": 5e-3},
        {"optimizer": "sgd", "learning_rate": 0.5, "loraplus_lr_ratio": 4.0},
        {"optimizer": "sgd", "learning_rate": 2.0, "momentum": 0.0},
    ],
    ids=["adamw", "loraplus", "sgd", "sgd-without-momentum"],
)
def test_five_steps_equal_those_of_peft_and_torch(folder: Path, changes: dict[str, object]) -> None:
    spec = replace(SPEC, **changes)
    losses, norms, masters = train(folder, 1 << 30, spec)
    fresh = TrainableAdapter(LORA, ModelConfig.from_dir(folder), seed=4)
    model = make_peft(make_reference("llama"), fresh, torch.float64, torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch_optimizer(model, spec)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, STEPS)
    for step, samples in enumerate(BATCHES):
        loss = peft_loss(model, samples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm)
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


def make_adapter(hidden: int = 8, rank: int = 2) -> TrainableAdapter:
    config = ModelConfig("llama", 17, hidden, 12, 1, 2, 1, 4)
    return TrainableAdapter(LoraSpec(r=rank), config, seed=0)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    adapter = make_adapter()
    optimizer = make_optimizer(adapter, TrainingSpec(optimizer=name))
    adapter.gradients.fill_(0.5)
    optimizer.step(1e-3)
    before = [adapter.parameters.clone(), *(t.clone() for t in optimizer.state().values())]
    adapter.gradients[3] = bad
    with pytest.raises(Diverged, match="not finite"):
        optimizer.step(1e-3)
    after = [adapter.parameters, *optimizer.state().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.step_count == 1


def test_unknown_optimizers_are_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest, match=r"'lion'.*adamw, adamw_8bit, sgd") as caught:
        make_optimizer(make_adapter(), TrainingSpec(optimizer="lion"))
    assert caught.value.param == "training.optimizer"


def test_sgd_without_momentum_keeps_no_state() -> None:
    optimizer = make_optimizer(make_adapter(), TrainingSpec(optimizer="sgd", momentum=0.0))
    assert optimizer.state() == {} and optimizer.nbytes == 0
    with_momentum = make_optimizer(make_adapter(), TrainingSpec(optimizer="sgd"))
    assert with_momentum.nbytes == with_momentum.adapter.parameters.nbytes


def test_8bit_state_is_for_large_tensors_and_the_rest_is_as_adamw() -> None:
    """Of 4096 elements and more: the A and B of 8 x 512 here; k_proj's and v_proj's B, 8 x 4, stay fp32."""
    adapters = [make_adapter(512, 8) for _ in range(2)]
    eight, full = (
        make_optimizer(adapter, TrainingSpec(optimizer=name))
        for adapter, name in zip(adapters, ("adamw_8bit", "adamw"), strict=True)
    )
    for step in range(3):
        for adapter in adapters:
            torch.manual_seed(step)
            adapter.gradients.normal_()
        eight.step(1e-3)
        full.step(1e-3)
    sizes = {end - start for start, end, _ in adapters[0].spans()}
    assert min(sizes) < 4096 <= max(sizes)
    for start, end, _ in adapters[0].spans():
        ours, theirs = (adapter.parameters[start:end] for adapter in adapters)
        if end - start < 4096:
            assert torch.equal(ours, theirs)
        else:
            assert not torch.equal(ours, theirs)
            assert (ours - theirs).abs().max() < 1e-3
    assert eight.nbytes < 0.3 * full.nbytes


def test_neighbouring_spans_of_one_factor_are_one() -> None:
    assert joined([(0, 3, 1.0), (3, 5, 1.0), (5, 9, 2.0), (9, 10, 1.0)]) == [
        (0, 5, 1.0),
        (5, 9, 2.0),
        (9, 10, 1.0),
    ]
    assert joined([(0, 3, 1.0), (4, 5, 1.0)]) == [(0, 3, 1.0), (4, 5, 1.0)]


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    state = make_optimizer(make_adapter(), TrainingSpec()).state()
    for name in ("adamw_8bit", "sgd"):
        with pytest.raises(InvalidRequest, match="fit the optimizer"):
            make_optimizer(make_adapter(), TrainingSpec(optimizer=name)).load_state(state, 1)
