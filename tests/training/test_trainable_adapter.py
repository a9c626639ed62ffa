"""The adapter in training: PEFT's start, patterns, refusals, rows and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from coserve.errors import InvalidRequest, NotFound
from coserve.lora.adapter import load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.peft_files import write_adapter
from coserve.models.config import LINEAR_MODULES, ModelConfig
from coserve.models.loader import load_model
from coserve.training.job import LoraSpec
from coserve.training.trainable_adapter import TrainableAdapter
from tests.parity.harness import Sequences, make_reference, save_reference
from tests.parity.training_harness import Trainer, fill_b

CONFIG = ModelConfig("llama", 97, 48, 88, 3, 6, 2, 8)


def test_starts_as_peft_does() -> None:
    adapter = TrainableAdapter(LoraSpec(r=16), CONFIG, seed=3)
    for module in adapter.modules:
        bound = module.a_RK.shape[1] ** -0.5
        assert module.b_RN.abs().max() == 0
        assert 0.95 * bound < module.a_RK.abs().max() <= bound
        assert module.a_RK.mean().abs() < 0.1 * bound
        assert module.scale == 2.0
    assert len(adapter.modules) == 3 * len(LINEAR_MODULES)
    assert adapter.rank == 16


def test_a_gaussian_start_is_that_of_peft() -> None:
    """A from N(0, 1/r^2), B zero: peft's `init_lora_weights="gaussian"`, by each module's own rank."""
    spec = LoraSpec(r=64, rank_pattern={"q_proj": 16}, init_lora_weights="gaussian")
    adapter = TrainableAdapter(spec, CONFIG, seed=3)
    for module in adapter.modules:
        deviations = module.a_RK.double().flatten() * module.rank
        assert deviations.std() == pytest.approx(1.0, abs=5 / (2 * len(deviations)) ** 0.5)
        assert deviations.abs().max() > 2.5 and module.b_RN.abs().max() == 0
    assert adapter.config["init_lora_weights"] == "gaussian"
    assert LoraConfig(init_lora_weights=adapter.config["init_lora_weights"])
    assert TrainableAdapter(LoraSpec(), CONFIG, seed=3).config["init_lora_weights"] is True


def test_the_seed_decides_the_start() -> None:
    first, same, other = (TrainableAdapter(LoraSpec(r=3), CONFIG, seed=s).parameters for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(r=5, lora_alpha=7.0, use_rslora=True),
        LoraSpec(
            r=5, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 9}, alpha_pattern={"mlp.up_proj": 3.0}
        ),
        LoraSpec(r=2, target_modules=("self_attn.k_proj", "down_proj"), layers_to_transform=(0, 2)),
        LoraSpec(r=4, rank_pattern={"o_proj": 3}, alpha_pattern={r".*_proj": 5.0}),
        LoraSpec(r=2, exclude_modules=("mlp.up_proj", "model.layers.1.self_attn.q_proj"), use_rslora=True),
        LoraSpec(
            r=2, target_modules=("model.layers.0.self_attn.q_proj", "up_proj"), layers_to_transform=(1,)
        ),
    ],
)
def test_ranks_and_scales_are_those_of_peft(spec: LoraSpec) -> None:
    """diffusers#14409, axolotl#3673: one alpha / r for modules of mixed ranks."""
    adapter = TrainableAdapter(spec, CONFIG, seed=0)
    accepted = LoraConfig.__dataclass_fields__.keys()
    settings = {k: v for k, v in adapter.config.items() if k in accepted}
    model = get_peft_model(make_reference("llama"), LoraConfig(**settings))
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            path = name.removeprefix("base_model.model.")
            found[path] = (layer.lora_A["default"].weight.shape[0], layer.scaling["default"])
    assert {m.path: (m.rank, pytest.approx(m.scale)) for m in adapter.modules} == found


@pytest.mark.parametrize(
    "spec,named",
    [
        (LoraSpec(target_modules=("q_proj", "c_attn")), "c_attn"),
        (LoraSpec(target_modules=("embed_tokens",)), "embedding"),
        (LoraSpec(rank_pattern={"nothing": 4}), "nothing"),
        (LoraSpec(target_modules=("q_proj",), alpha_pattern={"v_proj": 4.0}), "v_proj"),
        (LoraSpec(layers_to_transform=(0, 3)), "3"),
        (LoraSpec(r=0), "r is 0"),
        (LoraSpec(r=257), "1 to 256"),
        (LoraSpec(rank_pattern={"q_proj": 300}), "rank_pattern.q_proj is 300"),
        (LoraSpec(exclude_modules=("q_proj", "lm_tail")), "lm_tail"),
        (LoraSpec(target_modules=("q_proj",), exclude_modules=("self_attn.q_proj",)), "no module"),
        (LoraSpec(init_lora_weights="pissa"), "pissa"),
    ],
)
def test_refusals_name_what_is_wrong(spec: LoraSpec, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        TrainableAdapter(spec, CONFIG, seed=0)
    assert (caught.value.param or "").startswith("lora")


def test_rows_hold_the_scaled_weights_in_the_compute_dtype() -> None:
    spec = LoraSpec(r=4, rank_pattern={"q_proj": 2}, target_modules=("q_proj", "up_proj"))
    adapter = TrainableAdapter(spec, CONFIG, seed=0)
    fill_b(adapter)
    pool = AdapterPool(CONFIG, 8, torch.bfloat16)
    rows = [6, 1, 3, 2]
    adapter.place(pool, rows)
    for module in adapter.modules:
        a_RK, b_RN = pool.rows(module.module, module.layer)
        taken, left = rows[: module.rank], rows[module.rank :]
        assert torch.equal(a_RK[taken], module.a_RK.bfloat16())
        assert torch.equal(b_RN[taken], (module.b_RN * module.scale).bfloat16())
        assert not a_RK[left].any() and not b_RN[left].any()
    assert not pool.rows(LINEAR_MODULES.index("k_proj"), 0)[0].any()


def test_peft_loads_the_export_and_computes_the_same_logits(tmp_path: Path) -> None:
    """peft#2957, torchtune#2537: an export that PEFT took for nothing, because of its keys."""
    reference = make_reference("llama")
    decoder = load_model(save_reference(reference, tmp_path / "base"), "cpu", torch.float32)
    spec = LoraSpec(r=6, lora_alpha=5.0, rank_pattern={"v_proj": 2}, use_rslora=True)
    adapter = TrainableAdapter(spec, decoder.config, seed=0, base_model_name="base")
    fill_b(adapter)
    write_adapter(tmp_path / "adapter", adapter.tensors(), adapter.config)
    model = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    tokens = list(range(5, 30))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0, -1:]
    trainer = Trainer.make(decoder, adapter)
    ours = Sequences(decoder, 1).run({0: tokens}, trainer.lora_batch(len(tokens)))
    base = Sequences(decoder, 1).run({0: tokens})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - base).abs().max() > 0.1
    host = load_adapter(tmp_path / "adapter", decoder.config, 64)
    assert host.rank == 6


def test_export_holds_the_fp32_masters(tmp_path: Path) -> None:
    adapter = TrainableAdapter(LoraSpec(r=3), CONFIG, seed=0)
    write_adapter(tmp_path / "adapter", adapter.tensors(), adapter.config)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == adapter.tensors().keys()
    assert all(torch.equal(stored[key], master) for key, master in adapter.tensors().items())


def test_goes_on_from_another_adapter_as_peft_does(tmp_path: Path) -> None:
    """The weights as they are, the scale by the job's own alpha; another rank is refused."""
    reference = make_reference("llama")
    decoder = load_model(save_reference(reference, tmp_path / "base"), "cpu", torch.float32)
    given = TrainableAdapter(LoraSpec(r=3, lora_alpha=3.0), decoder.config, seed=0)
    fill_b(given)
    write_adapter(tmp_path / "given", given.tensors(), given.config)
    adapter = TrainableAdapter(LoraSpec(r=3, lora_alpha=12.0), decoder.config, seed=9)
    adapter.start_from(tmp_path / "given", decoder.config)
    assert torch.equal(adapter.parameters, given.parameters)

    config = LoraConfig.from_pretrained(tmp_path / "given")
    config.lora_alpha = 12
    model = PeftModel.from_pretrained(reference, tmp_path / "given", config=config, is_trainable=True).eval()
    tokens = list(range(5, 30))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0, -1:]
    trainer = Trainer.make(decoder, adapter)
    ours = Sequences(decoder, 1).run({0: tokens}, trainer.lora_batch(len(tokens)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)

    with pytest.raises(InvalidRequest, match=r"lora_A\.weight has shape \[3, 48\], not \[4, 48\]"):
        TrainableAdapter(LoraSpec(r=4), decoder.config, seed=9).start_from(tmp_path / "given", decoder.config)
    fewer = TrainableAdapter(LoraSpec(r=3, target_modules=("q_proj",)), decoder.config, seed=9)
    with pytest.raises(InvalidRequest, match=r"it has base_model\..*\(and \d+ more tensors\)"):
        fewer.start_from(tmp_path / "given", decoder.config)
    with pytest.raises(NotFound):
        adapter.start_from(tmp_path / "absent", decoder.config)
