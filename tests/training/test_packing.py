"""Packed examples are trained as each would be alone: attention, positions and targets stay inside one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coserve.models.config import ModelConfig
from coserve.models.loader import random_weights
from coserve.training.batching import BatchPlan
from coserve.training.chat_data import Example
from coserve.training.data_file import DataFile
from coserve.training.dataset import TokenDataset, count_trained
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.microbatch import Microbatch, Sample
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world
from tests.parity.training_harness import Trainer, fill_b
from tests.training.data_rows import ANSWER, TOKENIZER, USER, chat, lines, trained_text

CONFIG = ModelConfig(
    family="llama",
    vocab_size=TOKENIZER.id_limit,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
PACKED = TrainingSpec(packing=True, max_length=96, batch_size=1, shuffle=False)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    adapter = TrainableAdapter(LoraSpec(r=4), CONFIG, seed=1)
    fill_b(adapter)
    return Trainer.make(random_weights(CONFIG, 0, torch.float32), adapter)


def first_pack(folder: Path, rows: list[object]) -> list[Sample]:
    """The examples of the first batch, which one pack and one microbatch hold."""
    TokenDataset.write(folder / "data", DataFile(lines(*rows), TOKENIZER, 96))
    dataset = TokenDataset.open(folder / "data")
    (examples,) = BatchPlan(dataset, PACKED, seed=0).step(1).microbatches
    assert len(examples) > 2
    return [dataset[i] for i in examples]


def check_packed_is_separate(trainer: Trainer, samples: list[Sample]) -> None:
    packed = trainer.gradients(samples)
    gradients = trainer.adapter.gradients.clone()
    total = sum(count_trained(labels) for _, labels in samples)
    loss, summed = 0.0, torch.zeros_like(gradients)
    for sample in samples:
        share = count_trained(sample[1]) / total
        loss += trainer.gradients([sample]) * share
        summed += trainer.adapter.gradients * share
    assert packed == pytest.approx(loss, rel=1e-6)
    assert (gradients - summed).abs().max() <= 1e-5 * summed.abs().max() > 0


def test_packed_loss_is_that_of_separate_examples_even_with_a_mask_of_ones(
    trainer: Trainer, tmp_path: Path
) -> None:
    """transformers#46634, trl#1230: every token is trained and the rows' own mask is all ones."""
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(0, 200, n).tolist(), "attention_mask": [1] * n} for n in (30, 2, 41, 20)
    ]
    check_packed_is_separate(trainer, first_pack(tmp_path, rows))


def test_the_mask_of_the_answers_survives_packing(trainer: Trainer, tmp_path: Path) -> None:
    """trl#3728."""
    words = ("a", "bb", "hello you")
    rows = [
        chat(USER, {**ANSWER, "weight": 0}, USER, {"role": "assistant", "content": word}) for word in words
    ]
    samples = first_pack(tmp_path, rows)
    texts = [trained_text(Example("", ids.tolist(), labels.tolist())) for ids, labels in samples]
    assert texts == [[f"{word}<|end|>"] for word in words]
    microbatch = Microbatch(samples)
    targets = [int(t) for t in microbatch.targets_T if t != -100]
    assert targets == [int(label) for _, labels in samples for label in labels[1:] if label != -100]
    check_packed_is_separate(trainer, samples)


def test_accumulation_over_microbatches_gives_one_batch_s_update(trainer: Trainer) -> None:
    """transformers#34191, mlx-lm#1413, unsloth-zoo#1023: examples of unequal lengths, one microbatch or four,
    any window: the mean is over all trained tokens, and nothing is divided by the number of microbatches."""
    rng = np.random.default_rng(1)
    samples = [
        (ids, np.where(np.arange(len(ids)) < 3, -100, ids)) for ids in map(rng.permutation, (60, 9, 31, 5))
    ]
    whole = trainer.gradients(samples)
    wanted = trainer.adapter.gradients.clone()
    for limit, window in ((1, 0), (64, 7), (1, 1)):
        loss = trainer.gradients(samples, microbatch_tokens=limit, forward_window=window)
        assert loss == pytest.approx(whole, rel=1e-6)
        assert (trainer.adapter.gradients - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_pack_of_everything_is_a_batch_of_everything(tmp_path: Path) -> None:
    """Through the engine, to the bit: packing only says which examples make a batch."""
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    together = {"shuffle": False, "n_epochs": 2, "checkpoint_steps": 0}
    jobs = [
        world.make_job(data, tmp_path, "ftjob-1", batch_size=12, **together),
        world.make_job(data, tmp_path, "ftjob-2", batch_size=1, packing=True, max_length=2000, **together),
        world.make_job(data, tmp_path, "ftjob-3", batch_size=2, packing=True, max_length=150, **together),
    ]
    local = world.make_engine(model)
    for job in jobs:
        world.submit(local, job)
        world.finish(local, job.job_id)
    tuned = [world.final_adapter(job) for job in jobs]
    assert world.same_bits(tuned[0], tuned[1]) and not world.same_bits(tuned[0], tuned[2])
    steps = BatchPlan(TokenDataset.open(data), jobs[2].training, jobs[2].seed).total_steps
    assert len(list(local.take(world.m.JobProgress))) == 2 + 2 + steps and steps > 2
