"""LoRA-FA: A stays as it was drawn, B trains with the gradients it would have had anyway."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from coserve.kernels.dispatch import use_backend
from coserve.models.config import ModelConfig
from coserve.models.loader import load_model
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec
from coserve.training.optimizer import AdamW
from coserve.training.trainable_adapter import TrainableAdapter
from tests.invariants import world
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import Trainer, fill_b, gradient_tensors, make_samples


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_b_has_its_gradient_and_a_has_none(backend: str, tmp_path: Path) -> None:
    decoder = load_model(save_reference(make_reference("llama"), tmp_path), "cpu", torch.float32)
    samples = make_samples((70, 21), 97)
    found = []
    with use_backend(backend):
        for frozen in (False, True):
            adapter = TrainableAdapter(LoraSpec(r=4, freeze_a=frozen), decoder.config, seed=11)
            fill_b(adapter)
            Trainer.make(decoder, adapter).gradients(samples, backward_window=64)
            found.append(gradient_tensors(adapter))
    both, only_b = found
    assert only_b.keys() == {key for key in both if "lora_B" in key}
    assert all(torch.equal(both[key], only_b[key]) for key in only_b)


def test_a_costs_neither_gradient_nor_moments() -> None:
    config = ModelConfig("llama", 97, 48, 88, 3, 6, 2, 8)
    whole = TrainableAdapter(LoraSpec(r=4), config, seed=1)
    frozen = TrainableAdapter(LoraSpec(r=4, freeze_a=True), config, seed=1)
    a_elements = sum(module.a_RK.numel() for module in whole.modules)
    assert frozen.gradients.numel() == frozen.parameters.numel() == whole.parameters.numel() - a_elements
    assert AdamW(frozen, TrainingSpec()).nbytes == AdamW(whole, TrainingSpec()).nbytes - 8 * a_elements
    assert frozen.nbytes == whole.nbytes - 4 * a_elements
    masters = frozen.tensors()
    assert masters.keys() == whole.tensors().keys()
    assert all(torch.equal(masters[key], master) for key, master in whole.tensors().items())


def finished(model: Path, spec: JobSpec, restart_after: int | None) -> dict[str, torch.Tensor]:
    local = world.make_engine(model)
    world.submit(local, spec)
    if restart_after is not None:
        local.run_until(lambda: len(world.progress(local, spec.job_id)) == restart_after, 5000)
        local = world.make_engine(model)
        world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.final_adapter(spec)


def test_a_job_trains_b_alone_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    runs = []
    for name, restart_after in (("whole", None), ("cut", 3)):
        spec = world.make_job(data, tmp_path / name)
        lora = msgspec.structs.replace(spec.lora, freeze_a=True, lora_dropout=0.1)
        spec = msgspec.structs.replace(spec, lora=lora)
        runs.append(finished(model, spec, restart_after))
    assert world.same_bits(*runs)
    start = TrainableAdapter(lora, ModelConfig.from_dir(model), spec.seed).tensors()
    for key, tensor in runs[0].items():
        assert torch.equal(tensor, start[key]) == ("lora_A" in key)
