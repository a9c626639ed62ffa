"""config.json of every family, in old and new form, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve.errors import ConfigError
from coserve.models.config import LINEAR_MODULES, ModelConfig, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008],
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **changes})


def test_old_and_new_rope_fields_say_the_same() -> None:
    old = parse(rope_scaling=LLAMA3_ROPE)
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    assert ModelConfig.from_dict(new) == old
    assert old.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert old.rope_theta == 500000.0


def test_llama_1b() -> None:
    config = parse()
    assert config.num_parameters == 1235746816
    assert config.module_shape("q_proj") == (2048, 2048)
    assert config.module_shape("v_proj") == (512, 2048)
    assert config.module_shape("down_proj") == (2048, 8192)
    assert config.module_path(3, "up_proj") == "model.layers.3.mlp.up_proj"
    assert config.module_path(0, "o_proj") == "model.layers.0.self_attn.o_proj"
    assert config.eos_token_ids == (128001, 128008)
    assert config.torch_dtype == "bfloat16"
    assert len(LINEAR_MODULES) == 7


@pytest.mark.parametrize(
    "architecture,qkv,out,qk_norm",
    [
        ("LlamaForCausalLM", True, True, False),
        ("MistralForCausalLM", False, False, False),
        ("Qwen2ForCausalLM", True, False, False),
        ("Qwen3ForCausalLM", True, True, True),
    ],
)
def test_families(architecture: str, qkv: bool, out: bool, qk_norm: bool) -> None:
    config = parse(architectures=[architecture], attention_bias=True)
    assert (config.attention_bias, config.o_bias, config.qk_norm) == (qkv, out, qk_norm)


def test_a_sliding_window_caps_the_context() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral, sliding_window=4096).max_position_embeddings == 4096
    assert parse(**mistral, sliding_window=None).max_position_embeddings == 131072
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}
    assert parse(**qwen, use_sliding_window=False).max_position_embeddings == 131072
    assert parse(**qwen, use_sliding_window=True).max_position_embeddings == 4096


def test_end_tokens_of_both_files() -> None:
    assert ModelConfig.from_dict({**LLAMA, "eos_token_id": 5}, {"eos_token_id": [7, 5]}).eos_token_ids == (
        7,
        5,
    )
    assert parse(eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_refusals_name_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse(**changes)
    assert caught.value.param == "model"


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        ModelConfig.from_dir(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match="pickled weights are never loaded"):
        ModelConfig.from_dir(tmp_path)
