"""The backward's units: their order, that cuts at tile edges change no bit, that it may rest in between."""

from __future__ import annotations

import pytest
import torch

from coserve.core.training_sequence import TrainingUnit
from coserve.kernels.dispatch import native, use_backend
from coserve.models.config import ModelConfig
from coserve.models.loader import random_weights
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward, backward_units, window_bounds
from coserve.training.job import LoraSpec
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import CrossEntropy
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
    assert units[:2] == (TrainingUnit("loss", 256), TrainingUnit("loss", 6))
    assert [u.tokens for u in units[2:]] == [22, 128, 128] * 2
    assert {u.kind for u in units[2:]} == {"layer"}


def test_windows_cover_the_stream() -> None:
    assert window_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert window_bounds(100, 0) == [(0, 100)]


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
