"""From safetensors to a decoder: sharded, tied, and every wrong directory refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve.errors import ConfigError
from coserve.models import loader
from coserve.models.config import ModelConfig
from coserve.models.loader import load_model, random_weights, tensor_shapes
from tests.parity.harness import Sequences, make_reference, save_reference


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_reference(make_reference("llama"), tmp_path)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    held: dict[str, torch.Tensor | None] = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    reference = make_reference("qwen2-tied")
    one = load_model(save_reference(reference, tmp_path / "one"), "cpu", torch.float32)
    sharded = save_reference(reference, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    many = load_model(sharded, "cpu", torch.float32)
    assert torch.equal(Sequences(one, 1).run({0: [5, 6, 7]}), Sequences(many, 1).run({0: [5, 6, 7]}))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_reference(make_reference("qwen2-tied"), tmp_path, max_shard_size="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=gone.name):
        load_model(folder, "cpu", torch.float32)


def test_a_tied_head_shares_the_embedding(tmp_path: Path) -> None:
    folder = save_reference(make_reference("llama3-tied-rope"), tmp_path)
    decoder = load_model(folder, "cpu", torch.float32)
    assert decoder.embedding.table is decoder.head


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_copied_from_the_file_in_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loader, "FORGET_BYTES", 3 * 4096)
    folder = save_reference(make_reference("qwen2-tied").to(stored), tmp_path)
    file = folder / "model.safetensors"
    given = {name: tensor.clone() for name, tensor in load_file(file).items()}
    decoder = load_model(folder, "cpu", dtype)
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(decoder.head.unpacked(), given["model.embed_tokens.weight"].to(dtype))
    for number, layer in enumerate(decoder.layers):
        path = f"model.layers.{number}"
        merged = [given[f"{path}.self_attn.{n}_proj.weight"] for n in "qkv"]
        assert torch.equal(layer.attention.qkv.packed.unpacked(), torch.cat(merged).to(dtype))
        assert torch.equal(layer.mlp.down.packed.unpacked(), given[f"{path}.mlp.down_proj.weight"].to(dtype))
        assert layer.attn_norm is not None
        assert torch.equal(layer.attn_norm.weight, given[f"{path}.input_layernorm.weight"].to(dtype))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder, **{"model.norm.weight": None})
    with pytest.raises(ConfigError, match=r"lacks the tensor model\.norm\.weight"):
        load_model(folder, "cpu", torch.float32)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        load_model(folder, "cpu", torch.float32)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    change(folder, **{"model.norm.weight": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(3,\)"):
        load_model(folder, "cpu", torch.float32)


def test_integer_weights_are_refused(folder: Path) -> None:
    change(folder, **{"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    with pytest.raises(ConfigError, match="must be floats"):
        load_model(folder, "cpu", torch.float32)


def test_buffers_of_older_checkpoints_are_ignored(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load_model(folder, "cpu", torch.float32).config.num_layers == 3


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(ConfigError, match=r"model\.safetensors can't be read"):
        load_model(folder, "cpu", torch.float32)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    folder = save_reference(make_reference("qwen2-tied"), tmp_path, max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(ConfigError, match="not a safetensors index"):
        load_model(folder, "cpu", torch.float32)


def test_random_weights_follow_the_seed() -> None:
    config = ModelConfig("qwen2", 50, 32, 48, 2, 4, 2, 8, attention_bias=True)
    first, same, other = (random_weights(config, seed, torch.float32) for seed in (0, 0, 1))
    tokens = {0: [1, 2, 3]}
    logits = Sequences(first, 1).run(tokens)
    assert torch.equal(logits, Sequences(same, 1).run(tokens))
    assert not torch.equal(logits, Sequences(other, 1).run(tokens))
    assert "model.layers.1.self_attn.v_proj.bias" in tensor_shapes(config)
    assert first.nbytes >= 4 * config.num_parameters
