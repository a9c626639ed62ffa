"""Gradients of the hand-written backward against PEFT and autograd (rule I2).

The oracle is PEFT in float64. In fp32 our error may be at most the larger of 1e-5 of the tensor's largest
gradient and twice PEFT's own; in bf16 no larger than that of PEFT under bf16 autocast.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from coserve.training.job import LoraSpec
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import FAMILIES, MODELS, make_reference, save_reference
from tests.parity.training_harness import (
    Trainer,
    fill_b,
    gradient_tensors,
    make_peft,
    make_samples,
    peft_gradients,
    peft_loss,
)

SPECS = {
    "rank-1": LoraSpec(r=1),
    "rank-256": LoraSpec(r=256, rank_pattern={"v_proj": 200}),
    "rank-64": LoraSpec(r=64, lora_alpha=16.0),
    "attention": LoraSpec(r=4, target_modules=("q_proj", "v_proj")),
    "mlp-top": LoraSpec(r=4, target_modules=("gate_proj", "down_proj"), layers_to_transform=(1, 2)),
    "patterns": LoraSpec(
        r=6,
        lora_alpha=9.0,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 13},
        alpha_pattern={"o_proj": 3.0, r"layers\.2\..*": 5.0},
    ),
    "excluded": LoraSpec(
        r=3, exclude_modules=("layers.1.mlp.up_proj", "k_proj", "model.layers.0.mlp.down_proj")
    ),
    "rslora": LoraSpec(r=5, use_rslora=True, rank_pattern={"k_proj": 3}),
}


def load(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Decoder]:
    reference = make_reference(kind)
    return reference, load_model(save_reference(reference, folder), "cpu", dtype)


def make_trainer(decoder: Decoder, spec: LoraSpec) -> Trainer:
    adapter = TrainableAdapter(spec, decoder.config, seed=11)
    fill_b(adapter)
    return Trainer.make(decoder, adapter)


def check_against_peft(reference: PreTrainedModel, trainer: Trainer, samples: list, **windows: int) -> None:
    """Assert I2's bound for every tensor, and the loss."""
    exact_model = make_peft(reference, trainer.adapter, torch.float64, torch.float64)
    exact_loss = peft_loss(exact_model, samples)
    exact_loss.backward()
    theirs_model = make_peft(reference, trainer.adapter, torch.float32, torch.float32)
    peft_loss(theirs_model, samples).backward()
    exact, theirs = peft_gradients(exact_model), peft_gradients(theirs_model)
    loss = trainer.gradients(samples, **windows)
    ours = gradient_tensors(trainer.adapter)
    assert loss == pytest.approx(exact_loss.item(), rel=1e-6)
    assert ours.keys() == exact.keys()
    for key, gradient in exact.items():
        bound = max(1e-5 * float(gradient.abs().max()), 2 * float((theirs[key] - gradient).abs().max()))
        assert gradient.abs().max() > 0
        assert (ours[key] - gradient).abs().max() <= bound, key


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - set(FAMILIES)))
def test_kinds_beside_those_of_the_matrix(kind: str, tmp_path: Path) -> None:
    reference, decoder = load(kind, tmp_path)
    trainer = make_trainer(decoder, LoraSpec(r=8))
    check_against_peft(reference, trainer, make_samples((70, 21, 2, 45), 97), backward_window=64)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_adapter_shapes(spec: LoraSpec, tmp_path: Path) -> None:
    reference, decoder = load("llama", tmp_path)
    check_against_peft(reference, make_trainer(decoder, spec), make_samples((30, 41), 97))


@pytest.mark.parametrize("forward_window,backward_window", [(1, 64), (7, 7), (64, 1), (0, 0), (64, 64)])
def test_windows(forward_window: int, backward_window: int, tmp_path: Path) -> None:
    reference, decoder = load("qwen3-mqa", tmp_path)
    trainer = make_trainer(decoder, LoraSpec(r=4))
    samples = make_samples((83, 9, 40), 97)
    check_against_peft(
        reference, trainer, samples, forward_window=forward_window, backward_window=backward_window
    )


def test_no_gradient_below_the_lowest_adapted_layer(tmp_path: Path) -> None:
    _, decoder = load("llama", tmp_path)
    trainer = make_trainer(decoder, SPECS["mlp-top"])
    trainer.gradients(make_samples((30,), 97))
    assert trainer.adapter.lowest_layer == 1
    assert {m.layer for m in trainer.adapter.modules} == {1, 2}
    assert all(bool(m.da_RK.any()) and bool(m.db_RN.any()) for m in trainer.adapter.modules)


def test_packing_and_microbatches_change_nothing_that_matters(tmp_path: Path) -> None:
    """transformers#34191, mlx-lm#1413: a mean of the microbatches' means, wrong for unequal lengths.
    unsloth-zoo#1023: the loss divided by their number as well."""
    _, decoder = load("qwen2-tied", tmp_path)
    trainer = make_trainer(decoder, LoraSpec(r=4))
    samples = make_samples((50, 33, 64, 20), 97)
    together = trainer.gradients(samples)
    packed = trainer.adapter.gradients.clone()
    alone = trainer.gradients(samples, microbatch_tokens=1)
    assert alone == pytest.approx(together, rel=1e-6)
    error = (trainer.adapter.gradients - packed).abs().max()
    assert error <= 1e-5 * packed.abs().max()


def test_bfloat16_error_is_no_larger_than_that_of_peft_under_autocast(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    reference = make_reference("llama", **sizes).to(torch.bfloat16)
    folder = save_reference(reference, tmp_path)
    trainer = make_trainer(load_model(folder, "cpu", torch.bfloat16), LoraSpec(r=16))
    samples = make_samples((96, 50), 97)
    exact_model = make_peft(reference, trainer.adapter, torch.float64, torch.float64)
    peft_loss(exact_model, samples).backward()
    theirs_model = make_peft(reference, trainer.adapter, torch.bfloat16, torch.float32)
    peft_loss(theirs_model, samples, autocast=True).backward()
    trainer.gradients(samples, forward_window=64, backward_window=64)
    exact, theirs = peft_gradients(exact_model), peft_gradients(theirs_model)
    ours = gradient_tensors(trainer.adapter)
    ours_total = sum(float((ours[key] - g).square().sum()) for key, g in exact.items())
    theirs_total = sum(float((theirs[key] - g).square().sum()) for key, g in exact.items())
    assert ours_total <= theirs_total
