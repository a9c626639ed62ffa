"""Activation policies change memory, never numbers: A, B, C, mixtures, and switches in the middle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.kernels.dispatch import native
from coserve.models.config import ModelConfig
from coserve.models.decoder import Decoder
from coserve.models.loader import random_weights
from coserve.training.activations import MicrobatchActivations
from coserve.training.job import LoraSpec
from coserve.training.microbatch import LoraDropout, Microbatch
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.training_harness import Trainer, fill_b, make_samples

pytestmark = pytest.mark.skipif(native is None, reason="bits hold for the compiled kernels only")

LAYERS = 3
BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": LAYERS,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "qwen3": ModelConfig(family="qwen3", qk_norm=True, **BASE),
    "qwen2": ModelConfig(family="qwen2", attention_bias=True, **BASE),
    "gemma2": ModelConfig(
        family="gemma2",
        post_norms=True,
        norm_offset=1.0,
        wide_norms=True,
        attention_cap=3.0,
        layer_windows=(40, 0, 70),
        **BASE,
    ),
    "olmo2": ModelConfig(
        family="olmo2",
        pre_norms=False,
        post_norms=True,
        wide_norms=True,
        qk_norm=True,
        whole_qk_norm=True,
        **BASE,
    ),
    "phi3": ModelConfig(family="phi3", fused=True, rotary_features=4, **BASE),
}
SPECS = {
    "all": LoraSpec(r=4),
    "attention": LoraSpec(r=2, target_modules=("q_proj", "v_proj")),
    "o-top": LoraSpec(r=3, target_modules=("o_proj",), layers_to_transform=(1, 2)),
    "mlp-top": LoraSpec(r=3, target_modules=("gate_proj", "down_proj"), layers_to_transform=(1, 2)),
    "down-gap": LoraSpec(r=3, target_modules=("down_proj",), layers_to_transform=(0, 2)),
    "dropout": LoraSpec(r=4, lora_dropout=0.3),
}
SAMPLES = make_samples((90, 21, 3, 70), 67)
DECODERS: dict[tuple[str, torch.dtype], Decoder] = {}


def make_trainer(kind: str, spec: str, dtype: torch.dtype = torch.float32) -> Trainer:
    if (kind, dtype) not in DECODERS:
        DECODERS[kind, dtype] = random_weights(CONFIGS[kind], 0, dtype)
    adapter = TrainableAdapter(SPECS[spec], CONFIGS[kind], seed=1)
    fill_b(adapter)
    return Trainer.make(DECODERS[kind, dtype], adapter)


def levels(trainer: Trainer) -> int:
    """The highest level: two for every layer with a backward."""
    return 2 * (LAYERS - trainer.adapter.lowest_layer)


def check_every_level(kind: str, spec: str) -> None:
    trainer = make_trainer(kind, spec)
    dropout = LoraDropout(SPECS[spec].lora_dropout, 5, 2, range(len(SAMPLES)))
    loss = trainer.gradients(SAMPLES, backward_window=64, dropout=dropout)
    gradients = trainer.adapter.gradients.clone()
    assert bool(gradients.any())
    for level in range(levels(trainer)):
        windows = {"forward_window": 128, "backward_window": 64}
        assert trainer.gradients(SAMPLES, level=level, dropout=dropout, **windows) == loss
        assert torch.equal(trainer.adapter.gradients, gradients), level


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_level_gives_the_same_bits(kind: str) -> None:
    check_every_level(kind, "all")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "all"])
def test_every_level_gives_the_same_bits_with_any_adapter(spec: str) -> None:
    check_every_level("qwen2", spec)


@pytest.mark.long
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "all"])
@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "qwen3"])
def test_every_level_with_any_adapter_in_other_families(kind: str, spec: str) -> None:
    check_every_level(kind, spec)


@pytest.mark.parametrize("windows", [(0, 0), (7, 128), (64, 192)])
def test_recomputed_windows_need_not_be_those_of_the_forward(windows: tuple[int, int]) -> None:
    trainer = make_trainer("qwen3", "all")
    trainer.gradients(SAMPLES)
    gradients = trainer.adapter.gradients.clone()
    trainer.gradients(SAMPLES, forward_window=windows[0], backward_window=windows[1], level=0)
    assert torch.equal(trainer.adapter.gradients, gradients)


@settings(max_examples=25, deadline=None)
@given(
    spec=st.sampled_from(sorted(SPECS)),
    start=st.integers(0, 2 * LAYERS),
    drops=st.dictionaries(st.integers(0, 15), st.integers(0, 2 * LAYERS)),
)
def test_a_downgrade_between_any_two_units_leaves_the_bits(
    spec: str, start: int, drops: dict[int, int]
) -> None:
    trainer = make_trainer("qwen2", spec)
    loss = trainer.gradients(SAMPLES, backward_window=64)
    gradients = trainer.adapter.gradients.clone()
    taken = []

    def downgrade(unit: int, microbatch: Microbatch) -> None:
        saved = microbatch.saved
        if unit in drops and drops[unit] < saved.level:
            scribble_over_the_tail(trainer, saved, microbatch.num_tokens, drops[unit])
            saved.downgrade(drops[unit])
            taken.append(unit)

    level = min(start, levels(trainer))
    assert trainer.gradients(SAMPLES, backward_window=64, level=level, before_unit=downgrade) == loss
    assert torch.equal(trainer.adapter.gradients, gradients), taken


@pytest.mark.parametrize("spec", ["mlp-top", "o-top"])
def test_no_backward_reads_the_keys_of_layers_below_it(spec: str) -> None:
    trainer = make_trainer("qwen2", spec)
    loss = trainer.gradients(SAMPLES, backward_window=64)
    gradients = trainer.adapter.gradients.clone()

    def release(unit: int, microbatch: Microbatch) -> None:
        if unit == 0:
            config = trainer.decoder.config
            shape = (config, LAYERS, microbatch.num_tokens, torch.float32, trainer.adapter.lowest_layer)
            head = MicrobatchActivations.head_bytes(*shape)
            assert head == 2 * microbatch.num_tokens * 2 * 8 * 4
            arena(microbatch.saved)[:head] = 255
            microbatch.saved.release_head()

    assert trainer.gradients(SAMPLES, backward_window=64, before_unit=release) == loss
    assert torch.equal(trainer.adapter.gradients, gradients)


def scribble_over_the_tail(trainer: Trainer, saved: MicrobatchActivations, tokens: int, level: int) -> None:
    """What a request does with the slabs it takes: NaN wherever the lower level has nothing."""
    config = trainer.decoder.config
    shape = (config, config.num_layers, tokens, trainer.decoder.dtype, trainer.adapter.lowest_layer)
    kept = MicrobatchActivations.level_bytes(*shape)[level]
    arena(saved)[kept:] = 255


def arena(saved: MicrobatchActivations) -> torch.Tensor:
    """All bytes that the buffers lie in."""
    storage = saved.x_out_TH.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_in_bfloat16_windows_cut_alike_give_the_same_bits(kind: str) -> None:
    trainer = make_trainer(kind, "all", torch.bfloat16)
    trainer.gradients(SAMPLES, forward_window=64, backward_window=64)
    kept = trainer.adapter.gradients.clone()
    for level in (0, 2, 5):
        trainer.gradients(SAMPLES, forward_window=64, backward_window=64, level=level)
        assert torch.equal(trainer.adapter.gradients, kept), level


@pytest.mark.parametrize("spec", ["all", "mlp-top"])
def test_in_bfloat16_the_policies_stay_within_its_own_error(spec: str) -> None:
    exact = make_trainer("qwen3", spec)
    exact.gradients(SAMPLES)
    trainer = make_trainer("qwen3", spec, torch.bfloat16)
    trainer.gradients(SAMPLES, backward_window=64)
    kept = trainer.adapter.gradients.clone()
    error = (kept - exact.adapter.gradients).norm()
    for level in (0, levels(trainer) // 2):
        trainer.gradients(SAMPLES, forward_window=128, backward_window=64, level=level)
        assert (trainer.adapter.gradients - kept).norm() <= error, level


def test_the_lowest_layer_needs_no_gradient_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("qwen2", "mlp-top")
    lowest = trainer.decoder.layers[trainer.adapter.lowest_layer]
    for linear in (lowest.attention.qkv, lowest.attention.out, lowest.mlp.gate_up):
        monkeypatch.setattr(linear.packed, "backward_input", None)
    trainer.gradients(SAMPLES, backward_window=64)
    assert bool(trainer.adapter.gradients.any())
