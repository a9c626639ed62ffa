"""The backward's units: their order, that cuts at tile edges change no bit, that it may rest in between."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.training_sequence import TrainingUnit
from coserve.kernels.dispatch import native, use_backend
from coserve.models.config import ModelConfig
from coserve.models.loader import random_weights
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward, backward_units, window_bounds
from coserve.training.job import LoraSpec
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import ROWS, CrossEntropy, DirectPreference
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.training_harness import Trainer, fill_b, make_samples

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=131,
    hidden_size=48,
    intermediate_size=88,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    max_position_embeddings=512,
)


@pytest.fixture
def trainer() -> Trainer:
    decoder = random_weights(CONFIG, 0, torch.float32)
    adapter = TrainableAdapter(LoraSpec(r=5), CONFIG, seed=1)
    fill_b(adapter)
    return Trainer.make(decoder, adapter)


def test_units_are_loss_chunks_then_windows_of_each_layer_last_to_first() -> None:
    ids = list(range(278))
    microbatch = Microbatch([(ids, [-100] * 16 + ids[16:])])
    units = backward_units(microbatch, CrossEntropy(), num_layers=3, lowest_layer=1, window_tokens=128)
    assert units[:2] == (TrainingUnit("loss", 6), TrainingUnit("loss", ROWS, joins=True))
    assert sum(u.tokens for u in units[:17]) == 262 and {u.kind for u in units[:17]} == {"loss"}
    assert [u.tokens for u in units[17:]] == [22, 128, 128] * 2
    assert {u.kind for u in units[17:]} == {"layer"} and not any(u.joins for u in units[17:])


def test_tiles_of_a_layer_join_and_so_do_whole_tiles_of_an_adapted_head() -> None:
    ids = list(range(200))
    microbatch = Microbatch([(ids, [-100] * 51 + ids[51:])])
    units = backward_units(microbatch, CrossEntropy(), 2, 0, adapts_head=True)
    head = [TrainingUnit("loss", 21), *[TrainingUnit("loss", 64, joins=True)] * 2]
    assert list(units[:3]) == head
    layers = [
        [TrainingUnit("layer", 8, height), *[TrainingUnit("layer", 64, height, joins=True)] * 3]
        for height in (1, 0)
    ]
    assert list(units[3:]) == layers[0] + layers[1]
    preferences = backward_units(Microbatch([(ids, ids)] * 2), DirectPreference(0.1), 2, 0, adapts_head=True)
    kinds = [unit.kind for unit in preferences]
    assert kinds[:14] == ["score"] * 7 + ["loss"] * 7, "too long for a chunk: its tokens are scored ahead"


def test_windows_cover_the_stream() -> None:
    assert window_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert window_bounds(100, 0) == [(0, 64), (64, 100)]


def test_no_backward_without_trained_tokens() -> None:
    with pytest.raises(ValueError, match="without trained tokens"):
        backward_units(Microbatch([([1, 2], [-100, -100])]), CrossEntropy(), 2, 0)


@pytest.mark.skipif(native is None, reason="the compiled kernels are missing: bits hold for them only")
@pytest.mark.parametrize("forward_window,backward_window", [(64, 64), (128, 0), (0, 192), (7, 128)])
def test_cuts_at_tile_edges_change_no_bit(
    trainer: Trainer, forward_window: int, backward_window: int
) -> None:
    samples = make_samples((90, 71, 130, 8), CONFIG.vocab_size)
    whole_loss = trainer.gradients(samples)
    whole = trainer.adapter.gradients.clone()
    loss = trainer.gradients(samples, forward_window=forward_window, backward_window=backward_window)
    assert loss == whole_loss
    assert torch.equal(trainer.adapter.gradients, whole)


@pytest.mark.skipif(native is None, reason="the compiled kernels are missing: bits hold for them only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modules", ["every", "head"])
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_units_in_calls_of_any_length_give_the_same_bits(
    dtype: torch.dtype, modules: str, calls: list[int]
) -> None:
    decoder = random_weights(CONFIG, 0, dtype)
    targets = ("q_proj", "v_proj", "gate_proj", "down_proj") + (("lm_head",) if modules == "head" else ())
    adapter = TrainableAdapter(LoraSpec(r=5, target_modules=targets), CONFIG, seed=1)
    fill_b(adapter)
    trainer = Trainer.make(decoder, adapter)
    samples = make_samples((90, 71, 130, 8), CONFIG.vocab_size)
    alone = trainer.gradients(samples, backward_window=None)
    expected = adapter.gradients.clone()
    assert trainer.gradients(samples, backward_window=None, calls=cycle(calls)) == alone
    assert torch.equal(adapter.gradients, expected)
    assert trainer.gradients(samples) == alone, "windows of the whole microbatch"
    assert torch.equal(adapter.gradients, expected)


def test_only_neighbours_run_as_one_call(trainer: Trainer) -> None:
    microbatch = place(trainer, Microbatch(make_samples((100,), CONFIG.vocab_size)))
    with torch.no_grad():
        trainer.forward(microbatch, 64)
        backward = MicrobatchBackward(
            trainer.decoder, microbatch, trainer.adapter, trainer.pool, trainer.rows, grad_scale=1.0
        )
        with pytest.raises(ValueError, match="no neighbours"):
            backward.run_next(len(backward.units))
        with pytest.raises(IndexError):
            backward.run_next(len(backward.units) + 1)
        assert backward.cursor == 0


def test_rests_between_units_while_another_microbatch_goes_forward(trainer: Trainer) -> None:
    samples = make_samples((90, 71), CONFIG.vocab_size)
    trainer.gradients(samples, microbatch_tokens=1, backward_window=64)
    expected = trainer.adapter.gradients.clone()
    trainer.adapter.zero_gradients()
    trained = sum(sum(label != -100 for label in labels[1:]) for _, labels in samples)
    with torch.no_grad():
        first, second = (place(trainer, Microbatch([sample])) for sample in samples)
        trainer.forward(first, 64)
        backward = MicrobatchBackward(
            trainer.decoder,
            first,
            trainer.adapter,
            trainer.pool,
            trainer.rows,
            grad_scale=1 / trained,
            window_tokens=64,
        )
        seen = []
        while backward.next is not None:
            seen.append(backward.next)
            backward.run_next()
            if len(seen) == 3:
                trainer.forward(second, 64)
        assert tuple(seen) == backward.units
        with pytest.raises(IndexError):
            backward.run_next()
        backward = MicrobatchBackward(
            trainer.decoder,
            second,
            trainer.adapter,
            trainer.pool,
            trainer.rows,
            grad_scale=1 / trained,
            window_tokens=64,
        )
        while not backward.done:
            backward.run_next()
    trainer.adapter.finish_gradients()
    assert torch.equal(trainer.adapter.gradients, expected)


def place(trainer: Trainer, microbatch: Microbatch) -> Microbatch:
    shape = (CONFIG, CONFIG.num_layers, microbatch.num_tokens, torch.float32, 0)
    extent = torch.empty(MicrobatchActivations.nbytes(*shape), dtype=torch.uint8)
    microbatch.activations = MicrobatchActivations(extent, *shape)
    return microbatch


def test_the_reference_kernels_agree_with_the_compiled_ones(trainer: Trainer) -> None:
    samples = make_samples((70, 33), CONFIG.vocab_size)
    loss = trainer.gradients(samples, backward_window=64)
    gradients = trainer.adapter.gradients.clone()
    with use_backend("reference"):
        reference_loss = trainer.gradients(samples, backward_window=64)
    assert loss == pytest.approx(reference_loss, rel=1e-6)
    error = (gradients - trainer.adapter.gradients).abs().max()
    assert error <= 1e-5 * gradients.abs().max()
