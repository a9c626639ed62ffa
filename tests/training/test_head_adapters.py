"""Training an adapter on lm_head: inside the loss's chunks, with PEFT's gradients, files and logits.

trl#4612, trl#5676: a head computed in chunks must include its LoRA, forward and backward.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coserve.kernels.dispatch import use_backend
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.peft_files import write_adapter
from coserve.models.loader import load_model
from coserve.training.batch_run import BatchRun
from coserve.training.job import LoraSpec
from coserve.training.objectives import CrossEntropy
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.worker.kv_tensors import KVTensors
from tests.invariants import world
from tests.parity.harness import make_reference, save_reference
from tests.parity.training_harness import Trainer, drive, fill_b, gradient_tensors, make_samples
from tests.training.test_dropout import DROPOUT, RATE, masked_gradients
from tests.training.test_gradients import check_against_peft

SPECS = {
    "head-and-blocks": LoraSpec(r=4, target_modules=("v_proj", "down_proj", "lm_head")),
    "head-only": LoraSpec(r=3, target_modules=("lm_head",), use_rslora=True),
    "patterns": LoraSpec(
        r=2, target_modules=("q_proj", "lm_head"), rank_pattern={"lm_head": 6}, alpha_pattern={"lm_head": 5.0}
    ),
    "frozen-a": LoraSpec(r=4, target_modules=("q_proj", "lm_head"), freeze_a=True),
    "one-layer": LoraSpec(r=4, target_modules=("q_proj", "lm_head"), layers_to_transform=(1,)),
}


def make_trainer(kind: str, folder: Path, spec: LoraSpec):
    reference = make_reference(kind)
    decoder = load_model(save_reference(reference, folder), "cpu", torch.float32)
    adapter = TrainableAdapter(spec, decoder.config, seed=11)
    fill_b(adapter)
    return reference, Trainer.make(decoder, adapter)


@pytest.mark.parametrize("kind", ["qwen2-tied", "llama"])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    """More trained tokens than one chunk holds."""
    spec = SPECS[name]
    reference, trainer = make_trainer(kind, tmp_path, spec)
    samples = make_samples((150, 181, 40), 97)
    if not spec.freeze_a:
        check_against_peft(reference, trainer, samples, backward_window=64)
    else:
        trainer.gradients(samples)
        assert trainer.adapter.frozen.numel() and trainer.adapter.gradients.any()
    assert trainer.adapter.lowest_layer == {"head-only": 3, "one-layer": 1}.get(name, 0)


def test_dropout_of_the_head_is_that_of_peft_under_the_same_masks(tmp_path: Path) -> None:
    spec = LoraSpec(r=4, target_modules=("up_proj", "lm_head"), lora_dropout=RATE)
    reference, trainer = make_trainer("qwen2-tied", tmp_path, spec)
    samples = make_samples((70, 21, 2, 45), 97)
    exact_loss, exact = masked_gradients(reference, trainer.adapter, samples, torch.float64)
    loss = trainer.gradients(samples, backward_window=64, dropout=DROPOUT)
    ours = gradient_tensors(trainer.adapter)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert any("lm_head" in key for key in exact) and ours.keys() == exact.keys()
    for key, gradient in exact.items():
        assert (ours[key] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_windows_and_levels_change_no_bit(backend: str, tmp_path: Path) -> None:
    _, trainer = make_trainer("llama", tmp_path, SPECS["patterns"])
    samples = make_samples((150, 181), 97)
    with use_backend(backend):
        loss = trainer.gradients(samples, forward_window=64, backward_window=64)
        whole = trainer.adapter.gradients.clone()
        cuts = {"forward_window": 128, "backward_window": 64, "level": 1}
        assert trainer.gradients(samples, **cuts) == pytest.approx(loss, rel=0 if backend == "auto" else 1e-6)
    if backend == "auto":
        assert torch.equal(trainer.adapter.gradients, whole)


def test_scores_include_the_head_of_their_adapter_and_no_dropout(tmp_path: Path) -> None:
    """Validation and references are scored with the adapter's own head, undropped; the base with none."""
    _, trainer = make_trainer("qwen2-tied", tmp_path, LoraSpec(r=4, target_modules=("lm_head",)))
    decoder, adapter = trainer.decoder, trainer.adapter
    pool, kv = AdapterPool(decoder.config, 8, torch.float32), KVTensors(decoder.config, 500, 4, torch.float32)
    rows = {"job": [5, 2, 7, 1]}
    adapter.place(pool, rows["job"])
    samples = make_samples((70, 90), 97)
    losses = {}
    for key in ("job", None):
        run = BatchRun(
            decoder,
            CrossEntropy(),
            [samples],
            name="e",
            job_id="job",
            adapter=key,
            pool=pool,
            rows=rows,
            kv=kv,
        )
        drive(run, decoder, pool, rows, kv)
        losses[key] = run.sums()[0].loss / run.count
    assert losses["job"] == pytest.approx(trainer.gradients(samples), rel=1e-6)
    assert losses[None] != pytest.approx(losses["job"], rel=1e-3)
    with pytest.raises(KeyError):
        run = BatchRun(
            decoder,
            CrossEntropy(),
            [samples],
            name="e",
            job_id="job",
            adapter="gone",
            pool=pool,
            rows=rows,
            kv=kv,
        )
        drive(run, decoder, pool, {**rows, "gone": rows["job"]}, kv)


def test_a_job_trains_serves_and_exports_the_head(tmp_path: Path) -> None:
    """peft#2018, peft#2092, peft#3585, transformers#45127: with tied weights the embedding keeps its bits."""
    model, data = world.make_model(tmp_path / "model"), world.make_data(tmp_path / "data")
    spec = world.make_job(data, tmp_path, learning_rate=5e-2)
    lora = LoraSpec(r=4, target_modules=("q_proj", "lm_head"), lora_dropout=0.1)
    spec = msgspec.structs.replace(spec, lora=lora)
    local = world.make_engine(model)
    table = local.engine.decoder.head.unpacked()
    empty = local.engine.pool.nbytes
    world.submit(local, spec)
    head = 4 * 4 * (97 + 32)
    assert local.engine.pool.nbytes == empty + head
    ledger = local.engine.stats.snapshot(0).memory_bytes
    assert ledger["adapters"] == empty // local.engine.pool.max_rows * 4 + head
    world.finish(local, spec.job_id)
    assert torch.equal(local.engine.decoder.head.unpacked(), table)
    assert local.engine.decoder.embedding.table is local.engine.decoder.head
    local.run_until(lambda: not local.engine.has_work, 1000)
    assert local.engine.slots.unload(spec.job_id), "its rows wait for its version alone"
    assert local.engine.pool.nbytes == empty, "the job's head is freed with its rows"

    folder = max(path for path in Path(spec.checkpoint_dir).iterdir() if path.is_dir())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_B.weight"].abs().max() > 0
    base = AutoModelForCausalLM.from_pretrained(model)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(theirs.get_input_embeddings().weight, table)
    prompt = [3, 9, 4]
    answers = local.generate(prompt, world.GREEDY, world.ref(folder, model))
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + answers])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answers
    assert answers != local.generate(prompt, world.GREEDY)


def test_goes_on_from_an_adapter_with_a_head(tmp_path: Path) -> None:
    _, trainer = make_trainer("qwen2-tied", tmp_path / "base", SPECS["patterns"])
    write_adapter(tmp_path / "given", trainer.adapter.tensors(), trainer.adapter.config)
    decoder = trainer.decoder
    again = TrainableAdapter(SPECS["patterns"], decoder.config, seed=1)
    again.start_from(tmp_path / "given", decoder.config, decoder.head)
    assert torch.equal(again.parameters, trainer.adapter.parameters)
