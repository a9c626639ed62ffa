"""Faults that trainers and servers of adapters have had, one test each; the docstring names whose they were.

More of them are tested where the thing is: gradients, packing and windows in test_gradients.py, files in
tests/lora/test_peft_files.py, the head in test_head_adapters.py, resuming in test_defects_resume.py.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.peft_files import write_adapter
from coserve.models.decoder import Decoder
from coserve.models.loader import load_model
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import MicrobatchBackward
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.microbatch import Microbatch
from coserve.training.optimizer import make_optimizer
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world
from tests.parity.harness import Sequences, make_reference, save_reference
from tests.parity.training_harness import Trainer, fill_b, make_samples

MIXED = LoraSpec(
    r=6,
    lora_alpha=9.0,
    use_rslora=True,
    rank_pattern={"q_proj": 2, "up_proj": 9},
    alpha_pattern={"o_proj": 3.0},
)


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return load_model(save_reference(make_reference("llama"), tmp_path / "base"), "cpu", torch.float32)


def make_adapter(decoder: Decoder, spec: LoraSpec, seed: int = 11) -> TrainableAdapter:
    adapter = TrainableAdapter(spec, decoder.config, seed=seed)
    fill_b(adapter)
    return adapter


def take_step(trainer: Trainer, optimizer, seed: int = 3, learning_rate: float = 1e-2) -> None:
    trainer.gradients(make_samples((30, 41), 97, seed=seed))
    optimizer.step(learning_rate)
    trainer.adapter.write_rows(trainer.pool, trainer.rows)


@pytest.mark.parametrize("level", [0, 2, None])
def test_every_b_moves_where_activations_are_computed_again(decoder: Decoder, level: int | None) -> None:
    """transformers#42489, transformers#25846: recomputation under a frozen embedding lost the gradients."""
    trainer = Trainer.make(decoder, TrainableAdapter(LoraSpec(r=4), decoder.config, seed=1))
    optimizer = make_optimizer(trainer.adapter, TrainingSpec())
    trainer.gradients(make_samples((30, 41), 97), level=level)
    optimizer.step(1e-3)
    assert len(trainer.adapter.modules) == 21
    assert all(module.b_RN.ne(0).any() for module in trainer.adapter.modules)


def test_the_served_rows_are_the_trained_rows(decoder: Decoder, tmp_path: Path) -> None:
    """vllm#10798, diffusers#14409, axolotl#3673: another scale when served than in training, by rsLoRA or by
    module. What is exported and loaded lies in the pool with the bits that training computed with."""
    adapter = make_adapter(decoder, MIXED)
    pool = AdapterPool(decoder.config, 30, torch.float32)
    trained, served = list(range(9)), list(range(20, 29))
    adapter.place(pool, trained)
    write_adapter(tmp_path / "adapter", adapter.tensors(), adapter.config)
    pool.write(served, load_adapter(tmp_path / "adapter", decoder.config))
    assert torch.equal(pool.ranks(served), pool.ranks(trained))
    for layer in range(3):
        for module in range(7):
            for rows in pool.rows(module, layer):
                assert rows[trained].any() and torch.equal(rows[served], rows[trained])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_goes_on_in_fp32(
    decoder: Decoder, dtype: torch.dtype, tmp_path: Path
) -> None:
    """peft#1706, peft#2421: training resumed on half-precision weights, whose updates round away."""
    given = make_adapter(decoder, LoraSpec(r=4))
    halves = {key: tensor.to(dtype).contiguous() for key, tensor in given.tensors().items()}
    write_adapter(tmp_path / "adapter", given.tensors(), given.config)
    save_file(halves, tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = TrainableAdapter(LoraSpec(r=4), decoder.config, seed=2)
    adapter.start_from(tmp_path / "adapter", decoder.config)
    for key, master in adapter.tensors().items():
        assert master.dtype == torch.float32 and torch.equal(master, halves[key].float())
    before = adapter.parameters.clone()
    take_step(Trainer.make(decoder, adapter), make_optimizer(adapter, TrainingSpec()), learning_rate=1e-7)
    moved, after = adapter.parameters != before, adapter.parameters.to(dtype)
    assert moved.float().mean() > 0.9
    assert (after == before.to(dtype)).float().mean() > 0.9, "steps that half precision can't hold"


def test_live_logits_are_those_of_the_merged_weights(decoder: Decoder, tmp_path: Path) -> None:
    """peft#2502, peft#1388, unsloth#869: merged and live adapters disagreed, or merging did nothing."""
    adapter = make_adapter(decoder, MIXED)
    write_adapter(tmp_path / "adapter", adapter.tensors(), adapter.config)
    model = peft.PeftModel.from_pretrained(make_reference("llama"), tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    tokens = list(range(5, 35))
    trainer = Trainer.make(decoder, adapter)
    live = Sequences(decoder, 1).run({0: tokens}, trainer.lora_batch(len(tokens)))
    base = Sequences(decoder, 1).run({0: tokens})
    with torch.no_grad():
        expected = merged(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(live, expected, rtol=0, atol=1e-4)
    assert (live - base).abs().max() > 0.1


def test_served_logprobs_follow_the_trainer_after_every_push(decoder: Decoder) -> None:
    """SkyRL#1776: log-probabilities of trainer and server drifted apart after weight pushes."""
    trainer = Trainer.make(decoder, make_adapter(decoder, MIXED))
    optimizer = make_optimizer(trainer.adapter, TrainingSpec())
    (sample,) = make_samples((40,), 97)
    seen = []
    for push in range(3):
        take_step(trainer, optimizer, seed=push)
        microbatch = Microbatch([sample])
        run_backward(trainer, microbatch)
        with torch.no_grad():
            batch = Sequences(decoder, 1).batch({0: sample[0]}, trainer.lora_batch(40))
            served = decoder.logits(decoder.final_norm(decoder.forward(batch))).log_softmax(-1)
        rows = microbatch.trained_rows
        ours = served[rows, microbatch.targets_T[rows]]
        torch.testing.assert_close(microbatch.logprobs_T[rows], ours, rtol=0, atol=1e-5)
        seen.append(ours.clone())
    assert (seen[0] - seen[2]).abs().max() > 1e-2, "the pushes changed what is served"


def run_backward(trainer: Trainer, microbatch: Microbatch) -> None:
    """Forward and backward, into the adapter's gradients."""
    shape = (trainer.decoder.config, 3, microbatch.num_tokens, torch.float32, trainer.adapter.lowest_layer)
    extent = torch.full((MicrobatchActivations.nbytes(*shape),), 255, dtype=torch.uint8)
    microbatch.activations = MicrobatchActivations(extent, *shape)
    with torch.no_grad():
        trainer.forward(microbatch, 64)
        backward = MicrobatchBackward(
            trainer.decoder, microbatch, trainer.adapter, trainer.pool, trainer.rows, grad_scale=1.0
        )
        while not backward.done:
            backward.run_next()


def test_one_adapters_step_leaves_the_other_alone(decoder: Decoder) -> None:
    """open-rl#80: the optimizer step of one adapter consumed the gradients of another."""
    pool = AdapterPool(decoder.config, 8, torch.float32)
    trainers = []
    for seed, rows in ((1, [0, 1, 2]), (2, [7, 4, 5])):
        adapter = make_adapter(decoder, LoraSpec(r=3), seed)
        adapter.place(pool, rows)
        trainers.append(Trainer(decoder, adapter, rows, pool))
    first, second = trainers
    for trainer in trainers:
        trainer.gradients(make_samples((30, 41), 97))
    parameters, gradients = second.adapter.parameters.clone(), second.adapter.gradients.clone()
    rows = [t[second.rows].clone() for layer in range(3) for m in range(7) for t in pool.rows(m, layer)]
    alone = make_optimizer(second.adapter, TrainingSpec(max_grad_norm=0.5))
    make_optimizer(first.adapter, TrainingSpec()).step(1e-2)
    first.adapter.write_rows(pool, first.rows)
    assert torch.equal(second.adapter.parameters, parameters)
    assert torch.equal(second.adapter.gradients, gradients)
    after = [t[second.rows] for layer in range(3) for m in range(7) for t in pool.rows(m, layer)]
    assert all(torch.equal(one, two) for one, two in zip(rows, after, strict=True))
    assert alone.step(1e-2) == pytest.approx(float(gradients.double().norm()), rel=1e-6)


def test_rows_beyond_a_modules_rank_stay_zero(decoder: Decoder) -> None:
    """SkyRL#395: slots padded to the largest rank filled up during training."""
    adapter = make_adapter(decoder, LoraSpec(r=2, rank_pattern={"q_proj": 6}))
    pool = AdapterPool(decoder.config, 6, torch.float32)
    adapter.place(pool, list(range(6)))
    trainer = Trainer(decoder, adapter, list(range(6)), pool)
    optimizer = make_optimizer(adapter, TrainingSpec())
    for seed in (1, 2):
        take_step(trainer, optimizer, seed)
    for module in adapter.modules:
        a_RK, b_RN = pool.rows(module.module, module.layer)
        assert a_RK[: module.rank].all(1).any() and b_RN[: module.rank].any()
        assert not a_RK[module.rank :].any() and not b_RN[module.rank :].any()


def test_a_job_trains_the_rank_it_asked_for_and_never_the_base(tmp_path: Path) -> None:
    """SkyRL#1077: another rank and alpha than requested, or the base itself, was trained."""
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    local, spec = world.make_engine(model), world.make_job(data, tmp_path)
    decoder = local.engine.decoder
    tensors = base_tensors(decoder)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base_tensors(decoder).items())
    folder = max(path for path in Path(spec.checkpoint_dir).iterdir() if path.is_dir())
    config = peft.LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha) == (4, 8) and set(config.target_modules) == set(world.TARGETS)
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert len(shapes) == 2 * 2 * len(world.TARGETS)
    assert all(shape[0 if "lora_A" in key else 1] == 4 for key, shape in shapes.items())


def base_tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Copies of all frozen weights by name; the tied head is the embedding too."""
    found = {"head": decoder.head.unpacked()}
    for number, layer in enumerate(decoder.layers):
        for name in ("qkv", "out"):
            found[f"{number}.{name}"] = getattr(layer.attention, name).packed.unpacked()
        for name in ("gate_up", "down"):
            found[f"{number}.{name}"] = getattr(layer.mlp, name).packed.unpacked()
    return found
