"""LoRA dropout in training: PEFT's gradients under the same masks, and masks that nothing else can change."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coserve.errors import InvalidRequest
from coserve.kernels.dropout import row_keys
from coserve.models.loader import load_model
from coserve.training.job import JobSpec, LoraSpec
from coserve.training.lora_settings import resolve_lora
from coserve.training.microbatch import LoraDropout, Microbatch
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import (
    Trainer,
    fill_b,
    gradient_tensors,
    make_peft,
    make_samples,
    mask_dropout,
    peft_gradients,
    peft_loss,
)

RATE = 0.25
EXAMPLES = (7, 3, 11, 4)
DROPOUT = LoraDropout(RATE, seed=5, step=9, examples=EXAMPLES)


def masked_gradients(
    reference, adapter, samples, dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    model = make_peft(reference, adapter, dtype, dtype)
    loss = peft_loss(model, samples, masks=mask_dropout(model, adapter, DROPOUT))
    loss.backward()
    return loss.item(), peft_gradients(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    reference = make_reference("qwen2-tied")
    folder = save_reference(reference, tmp_path_factory.mktemp("base"))
    decoder = load_model(folder, "cpu", torch.float32)
    adapter = TrainableAdapter(LoraSpec(r=4, lora_dropout=RATE), decoder.config, seed=11)
    fill_b(adapter)
    return reference, Trainer.make(decoder, adapter), make_samples((70, 21, 2, 45), 97)


def test_gradients_are_those_of_peft_under_the_same_masks(trained) -> None:
    reference, trainer, samples = trained
    exact_loss, exact = masked_gradients(reference, trainer.adapter, samples, torch.float64)
    _, theirs = masked_gradients(reference, trainer.adapter, samples, torch.float32)
    loss = trainer.gradients(samples, backward_window=64, dropout=DROPOUT)
    ours = gradient_tensors(trainer.adapter)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert ours.keys() == exact.keys()
    for key, gradient in exact.items():
        bound = max(1e-5 * float(gradient.abs().max()), 2 * float((theirs[key] - gradient).abs().max()))
        assert gradient.abs().max() > 0
        assert (ours[key] - gradient).abs().max() <= bound, key


def test_windows_recomputation_packing_and_rate_zero(trained) -> None:
    _, trainer, samples = trained
    loss = trainer.gradients(samples, dropout=DROPOUT)
    whole = trainer.adapter.gradients.clone()
    for cut in (64, 128):
        again = trainer.gradients(samples, forward_window=cut, backward_window=cut, dropout=DROPOUT)
        assert again == loss and torch.equal(trainer.adapter.gradients, whole)
    for level in (0, 3, 5):  # activations that are computed again
        again = trainer.gradients(samples, backward_window=64, level=level, dropout=DROPOUT)
        assert again == loss and torch.equal(trainer.adapter.gradients, whole)
    apart = trainer.gradients(samples, forward_window=5, microbatch_tokens=1, dropout=DROPOUT)
    assert apart == pytest.approx(loss, rel=1e-6)
    assert (trainer.adapter.gradients - whole).abs().max() <= 1e-5 * whole.abs().max()
    for changed in (
        DROPOUT._replace(step=10),
        DROPOUT._replace(seed=6),
        DROPOUT._replace(examples=(3, 7, 11, 4)),
    ):
        assert trainer.gradients(samples, dropout=changed) != loss
    undropped = trainer.gradients(samples)
    whole = trainer.adapter.gradients.clone()
    assert undropped != loss
    assert trainer.gradients(samples, dropout=DROPOUT._replace(rate=0.0)) == undropped
    assert torch.equal(trainer.adapter.gradients, whole)


def test_a_microbatch_without_dropout_carries_no_keys() -> None:
    samples = make_samples((5, 6), 97)
    assert Microbatch(samples).dropout(0, 5) is None
    assert Microbatch(samples, dropout=LoraDropout(0.0, 1, 2, (0, 1))).dropout(0, 5) is None
    microbatch = Microbatch(samples, dropout=LoraDropout(0.5, 1, 2, (8, 4)))
    expected = np.concatenate([row_keys(1, 2, 8, np.arange(5)), row_keys(1, 2, 4, np.arange(6))])
    assert microbatch.dropout(3, 4).keys_T.tolist() == expected[3:7].tolist()
    assert microbatch.dropout(3, 4).rates_S.tolist() == [0.5]


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_its_range_is_refused(trained, rate: float) -> None:
    with pytest.raises(InvalidRequest, match="lora_dropout") as caught:
        resolve_lora(LoraSpec(lora_dropout=rate), trained[1].decoder.config)
    assert caught.value.param == "lora.lora_dropout"


# ------------------------------------------------------------------ in the engine


def make_job(data: Path, folder: Path, rate: float = 0.3, **training: object) -> JobSpec:
    spec = world.make_job(data, folder, **training)
    return msgspec.structs.replace(spec, lora=msgspec.structs.replace(spec.lora, lora_dropout=rate))


@pytest.fixture(scope="module")
def quiet(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    local, spec = world.make_engine(model), make_job(data, tmp_path_factory.mktemp("quiet"))
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.final_adapter(spec), world.progress(local, spec.job_id)


def test_load_and_windows_change_no_bit(model, data, tmp_path, quiet) -> None:
    """Chat rows of the batch are never dropped; those in training keep their masks."""
    adapter = world.make_adapter(model, tmp_path / "a2", 2, seed=2)
    alone = world.make_engine(model).generate([3, 4, 5], world.GREEDY, adapter)
    local, spec = world.make_engine(model), make_job(data, tmp_path, window_tokens=64)
    world.submit(local, spec)
    for index in range(6):
        local.add(f"r{index}", [3, 4, 5], world.GREEDY, adapter)
    world.finish(local, spec.job_id)
    local.run_until(lambda: not local.engine.scheduler.has_requests, 5000)
    assert world.same_bits(world.final_adapter(spec), quiet[0])
    assert world.progress(local, spec.job_id) == quiet[1]
    assert all(local.tokens[f"r{index}"] == alone for index in range(6))


def test_a_resumed_job_draws_the_same_masks(model, data, tmp_path, quiet) -> None:
    """transformers#17032, accelerate#4071: a run that was stopped draws the dropout of one that wasn't."""
    first, spec = world.make_engine(model), make_job(data, tmp_path)
    world.submit(first, spec)
    first.run_until(lambda: len(world.progress(first, spec.job_id)) == 3, 5000)
    second = world.make_engine(model)
    world.submit(second, spec)
    world.finish(second, spec.job_id)
    assert world.same_bits(world.final_adapter(spec), quiet[0])
    assert world.progress(second, spec.job_id)[-3:] == quiet[1][-3:]


def test_dropout_is_in_the_exported_settings_and_changes_the_training(model, data, tmp_path, quiet) -> None:
    local, spec = world.make_engine(model), make_job(data, tmp_path, rate=0.0)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    assert not world.same_bits(world.final_adapter(spec), quiet[0])
    config = TrainableAdapter(LoraSpec(lora_dropout=0.3), local.engine.model_config, seed=0).config
    assert config["lora_dropout"] == 0.3
