"""PEFT directories in and out. Every refusal says why."""

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve.errors import InvalidRequest, NotFound
from coserve.lora.adapter import load_adapter
from coserve.lora.peft_files import make_config, read_adapter_info, tensor_key, write_adapter
from tests.lora.conftest import ALL, load_base

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_config(path, **changes):
    file = path / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def edit_tensors(path, change):
    tensors = load_file(path / TENSORS)
    save_file(change(tensors) or tensors, path / TENSORS)
    return path


def delta(adapter, layer, name):
    module = adapter.modules[layer, name]
    return module.scale * module.b_NR @ module.a_RK


def peft_delta(model, path):
    module = model.get_submodule(f"base_model.model.{path}")
    return module.get_delta_weight("default").detach()


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_saves_is_what_we_load(save_adapter, base_dir, config, dtype):
    path = save_adapter(dtype)
    adapter = load_adapter(path, config, 64)
    assert adapter.rank == 4 and len(adapter.modules) == 21
    model = peft.PeftModel.from_pretrained(load_base(base_dir), path)
    for layer, name in adapter.modules:
        assert adapter.modules[layer, name].a_RK.dtype == torch.float32
        expected = peft_delta(model, config.module_path(layer, name))
        assert torch.allclose(delta(adapter, layer, name), expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.[12]\.mlp\.(up|down)_proj"},
        {"target_modules": ["mlp.up_proj", "o_proj"], "exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {"lora_alpha": 5, "r": 3, "rank_pattern": {r"model.layers.\d+.mlp.*": 1}},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1], "rank_pattern": {"lm_head": 7}},
        {"target_modules": r".*(q_proj|head)", "use_rslora": True},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=[
        "rslora",
        "patterns",
        "some-layers",
        "all-linear",
        "regex",
        "excluded",
        "regex-pattern",
        "head",
        "head-regex",
        "path",
    ],
)
def test_scales_and_ranks_are_those_of_peft(save_adapter, base_dir, config, settings):
    """diffusers#14409, axolotl#3673: one alpha / r for modules of mixed ranks."""
    path = save_adapter(**settings)
    adapter = load_adapter(path, config, 64)
    model = peft.PeftModel.from_pretrained(load_base(base_dir), path)
    adapted = {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert {config.module_path(*key) for key in adapter.modules} == adapted
    for layer, name in adapter.modules:
        expected = peft_delta(model, config.module_path(layer, name))
        assert torch.allclose(delta(adapter, layer, name), expected, atol=1e-6)
    assert adapter.rank == max(len(module.a_RK) for module in adapter.modules.values())


def test_the_digest_names_what_the_adapter_computes(save_adapter, config, tmp_path):
    path = save_adapter()
    digest = read_adapter_info(path, config, 64).digest
    copy = shutil.copytree(path, tmp_path / "copy")
    assert read_adapter_info(copy, config, 64).digest == digest
    edit_config(
        copy,
        target_modules=list(reversed(sorted(ALL))),
        base_model_name_or_path="elsewhere",
        lora_dropout=0.5,
    )
    assert read_adapter_info(copy, config, 64).digest == digest
    edit_config(copy, lora_alpha=9)
    assert read_adapter_info(copy, config, 64).digest != digest
    assert read_adapter_info(save_adapter(), config, 64).digest != digest


def no_key(tensors):
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def renamed(prefix, new):
    return lambda tensors: {key.replace(prefix, new): value for key, value in tensors.items()}


def reshaped(tensors):
    return {key: torch.zeros(4, 20) if "q_proj.lora_A" in key else value for key, value in tensors.items()}


REFUSED_CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
    ({"peft_type": "ADALORA"}, "peft_type 'ADALORA' is not supported"),
    ({"use_dora": True}, "DoRA is not supported"),
    ({"bias": "all"}, "bias 'all' is not supported"),
    ({"lora_bias": True}, "biases on lora_B"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    ({"layers_pattern": "h"}, "layers_pattern"),
    ({"from_the_future": 7}, "'from_the_future' that is not known"),
    ({"r": 0}, "r must be a positive integer"),
    ({"r": True}, "r must be a positive integer"),
    ({"lora_alpha": "x"}, "lora_alpha must be a number"),
    ({"target_modules": None}, "target_modules must name modules"),
    ({"target_modules": []}, "target_modules must name modules"),
    ({"target_modules": ["c_attn"]}, "unknown target module 'c_attn'"),
    ({"target_modules": [*ALL, "lm_head"]}, "missing key 'base_model.model.lm_head.lora_A.weight'"),
    ({"target_modules": [*ALL, "embed_tokens"]}, "embedding adapters are not supported"),
    ({"target_modules": "(("}, "not a valid regular expression"),
    ({"target_modules": "nothing"}, "match no linear layer"),
    ({"layers_to_transform": [9]}, "match no linear layer"),
    ({"layers_to_transform": "0"}, "layers_to_transform must be"),
    ({"target_modules": ["q_proj"]}, r"unexpected key .*and \d+ more"),
    ({"rank_pattern": {"nope": 2}}, "rank_pattern key 'nope' matches none"),
    ({"alpha_pattern": {"layers.7.q_proj": 2}}, "alpha_pattern key 'layers.7.q_proj' matches none"),
    ({"rank_pattern": {"q_proj": 2}}, r"shape \[4, 16\] where this model and this rank need \[2, 16\]"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED_CONFIGS, ids=[str(c) for c, _ in REFUSED_CONFIGS])
def test_settings_we_cannot_honour_are_refused_by_name(save_adapter, config, changes, reason):
    """peft#3582: a pattern key that matches nothing was inert. vllm#55193, vllm#34186, vllm#48019: an
    adapter that matches no served module passed for the base. vllm#9280: modules_to_save came up late.
    peft#1539: AdaLoRA's files, which are another method's."""
    path = edit_config(save_adapter(), **changes)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        read_adapter_info(path, config, 64, param="init_from")
    assert caught.value.param == "init_from"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_key, r"missing key '.*layers\.1\.mlp\.up_proj\.lora_B\.weight'"),
        (renamed("base_model.model.", "base_model.model._orig_mod."), "'_orig_mod' is a wrapper's"),
        (renamed("layers.1.", "layers.1._fsdp_wrapped_module."), "'_fsdp_wrapped_module' is a wrapper's"),
        (renamed("base_model.model.model", "base_model.model.language_model.model"), "unexpected key"),
        (renamed("base_model.model.", ""), "keys must begin with"),
        (renamed("lora_A.weight", "lora_A.default.weight"), "unexpected key"),
        (renamed("layers.2", "layers.3"), "unexpected key"),
        (reshaped, "another base model"),
        (
            lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 16)},
            "unexpected key 'base_model.model.lm_head.lora_A.weight'",
        ),
        (
            lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(40, 16)},
            "full copy of the head",
        ),
        (lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.zeros(4)}, "embedding adapters"),
        (
            lambda t: {**t, "base_model.model.x.lora_magnitude_vector": torch.zeros(4)},
            "DoRA is not supported",
        ),
        (lambda t: {k: v.double() for k, v in t.items()}, "dtype F64"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "dtype I8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(save_adapter, config, change, reason):
    """peft#2566, peft#2699, transformers#34068: missing or unexpected keys only warned, B stayed 0."""
    path = edit_tensors(save_adapter(), change)
    with pytest.raises(InvalidRequest, match=reason):
        read_adapter_info(path, config, 64)


def test_values_that_are_not_finite_are_refused(save_adapter, config):
    path = edit_tensors(save_adapter(), lambda t: {k: v * math.inf for k, v in t.items()})
    with pytest.raises(InvalidRequest, match="not finite"):
        load_adapter(path, config, 64)


def test_ranks_over_the_maximum_are_refused(save_adapter, config):
    path = save_adapter(r=8)
    assert read_adapter_info(path, config, 8).rank == 8
    with pytest.raises(InvalidRequest, match=r"rank 8 .* over the maximum of 7 \(--max-lora-rank\)"):
        read_adapter_info(path, config, 7)


def test_damaged_directories_are_refused(save_adapter, config, tmp_path):
    with pytest.raises(NotFound, match="no such adapter directory"):
        read_adapter_info(tmp_path / "nowhere", config, 64)
    path = save_adapter()
    whole = (path / TENSORS).read_bytes()
    broken = [
        whole[:5],
        whole[:40],
        whole[:-4],
        whole + b"x",
        b"\xff" * 8 + whole[8:],
        b"",
        b"\x02" + bytes(7) + b"[]",
    ]
    for data in broken:
        (path / TENSORS).write_bytes(data)
        with pytest.raises(InvalidRequest, match=f"{TENSORS} cannot be read"):
            read_adapter_info(path, config, 64)
    (path / TENSORS).unlink()
    with pytest.raises(InvalidRequest, match=f"there is no {TENSORS}$"):
        read_adapter_info(path, config, 64)
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidRequest, match=r"pickle files .* are never loaded"):
        read_adapter_info(path, config, 64)
    (path / CONFIG).write_text("{")
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read_adapter_info(path, config, 64)
    (path / CONFIG).unlink()
    with pytest.raises(InvalidRequest, match=f"there is no {CONFIG}"):
        read_adapter_info(path, config, 64)


@pytest.mark.parametrize(
    "header",
    [
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ],
)
def test_malformed_headers_are_refused(save_adapter, config, header):
    path = save_adapter()
    text = json.dumps(header).encode()
    (path / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_adapter_info(path, config, 64)


# ---------------------------------------------------------------- out


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_what_we_write_peft_loads_to_the_same_logits(base_dir, config, tmp_path, kind):
    generator = torch.Generator().manual_seed(1)
    settings = make_config(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"q_proj": 3.5},
        base_model_name="base",
    )
    tensors, deltas = {}, {}
    for layer in range(3):
        for name, rank, alpha in (("q_proj", 4, 3.5), ("down_proj", 2, 6)):
            outputs, inputs = config.module_shape(name)
            a = torch.randn(rank, inputs, generator=generator)
            b = torch.randn(outputs, rank, generator=generator)
            path = config.module_path(layer, name)
            tensors[tensor_key(path, "A")] = a if kind == "torch" else a.numpy()
            tensors[tensor_key(path, "B")] = b if kind == "torch" else b.numpy()
            deltas[path] = alpha / rank * b @ a
    write_adapter(tmp_path / "out", tensors, settings)

    ids = torch.tensor([[1, 5, 9, 30]])
    adapted = peft.PeftModel.from_pretrained(load_base(base_dir), tmp_path / "out")
    merged = load_base(base_dir)
    for path, change in deltas.items():
        merged.get_submodule(path).weight.data += change
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
    again = load_adapter(tmp_path / "out", config, 64)
    for layer, name in again.modules:
        assert torch.allclose(delta(again, layer, name), deltas[config.module_path(layer, name)], atol=1e-6)


def test_settings_and_keys_are_laid_out_as_peft_does(save_adapter, tmp_path, config):
    """peft#2957, torchtune#2537: exported keys carried a wrapper's prefix."""
    saved = save_adapter(lora_dropout=0.0, target_modules=sorted(ALL))
    theirs = json.loads((saved / CONFIG).read_text())
    write_adapter(
        tmp_path / "ours", load_file(saved / TENSORS), make_config(r=4, lora_alpha=8, target_modules=ALL)
    )
    ours = json.loads((tmp_path / "ours" / CONFIG).read_text())
    for name, value in ours.items():
        if name not in ("target_modules", "base_model_name_or_path"):
            assert theirs[name] == value, name
    assert sorted(theirs["target_modules"]) == ours["target_modules"]
    assert load_file(tmp_path / "ours" / TENSORS).keys() == load_file(saved / TENSORS).keys()
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").r == 4
    assert (
        read_adapter_info(saved, config, 64).modules
        == read_adapter_info(tmp_path / "ours", config, 64).modules
    )
