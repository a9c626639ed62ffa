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


def test_yarn_widens_the_context_that_the_file_names() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse(rope_scaling=yarn, max_position_embeddings=32768)
    assert config.max_position_embeddings == 131072
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(1.1386294)
    assert parse(rope_scaling=yarn, max_position_embeddings=200000).max_position_embeddings == 200000


def windows(architecture: str, **changes: Any) -> list[int]:
    config = parse(architectures=[architecture], num_hidden_layers=6, **changes)
    assert config.max_position_embeddings == 131072
    return [config.window(layer) for layer in range(6)]


def test_sliding_windows_by_layer() -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    assert windows("LlamaForCausalLM", sliding_window=64) == [0] * 6
    assert windows("MistralForCausalLM") == [4096] * 6
    assert windows("MistralForCausalLM", sliding_window=None) == [0] * 6
    assert windows("Phi3ForCausalLM") == [0] * 6
    assert windows("Phi3ForCausalLM", sliding_window=2047) == [2047] * 6
    assert windows("Phi3ForCausalLM", sliding_window=262144) == [0] * 6
    qwen = {"sliding_window": 512, "max_window_layers": 4}
    assert windows("Qwen2ForCausalLM", use_sliding_window=False, **qwen) == [0] * 6
    assert windows("Qwen3ForCausalLM", use_sliding_window=True, **qwen) == [0] * 4 + [512] * 2
    assert windows("Qwen2ForCausalLM", use_sliding_window=True, layer_types=kinds, **qwen) == [0, 512] * 3
    assert windows("Gemma2ForCausalLM") == [4096, 0] * 3
    assert windows("Gemma3ForCausalLM", sliding_window=512) == [512] * 5 + [0]
    assert windows("Gemma3ForCausalLM", sliding_window=512, sliding_window_pattern=3) == [512, 512, 0] * 2
    assert windows("Gemma3ForCausalLM", layer_types=kinds) == [0, 4096] * 3


def test_a_window_over_the_context_is_none_but_its_layer_stays_local() -> None:
    config = parse(architectures=["Gemma3ForCausalLM"], max_position_embeddings=256, sliding_window=256)
    assert config.window(0) == 0
    assert config.slides(0)
    assert not config.slides(5)


def test_gemma_reads_its_caps_and_its_query_scale() -> None:
    gemma = parse(architectures=["Gemma2ForCausalLM"], tie_word_embeddings=None)
    assert (gemma.attention_cap, gemma.logit_cap, gemma.attention_scale) == (50.0, 30.0, 1 / 16)
    assert gemma.tie_word_embeddings
    assert gemma.hidden_act == "gelu_tanh"
    plain = parse(
        architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=None, final_logit_softcapping=None
    )
    assert (plain.attention_cap, plain.logit_cap) == (0.0, 0.0)
    third = parse(architectures=["Gemma3ForCausalLM"], rope_theta=2e6, rope_local_base_freq=5e3)
    assert (third.attention_cap, third.logit_cap, third.rope_theta, third.local_rope_theta) == (
        0,
        0,
        2e6,
        5e3,
    )


PUBLISHED = {
    "Gemma-2-2b": (
        "Gemma2ForCausalLM",
        {"head_dim": 256, "sliding_window": 4096},
        (256000, 2304, 9216, 26, 8, 4),
        2614099968,
    ),
    "Gemma-3-1b": (
        "Gemma3ForCausalLM",
        {"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6},
        (262144, 1152, 6912, 26, 4, 1),
        999751680,
    ),
    "Phi-4-mini": (
        "Phi3ForCausalLM",
        {"partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True},
        (200064, 3072, 8192, 32, 24, 8),
        3835822080,
    ),
    "OLMo-2-7B": ("Olmo2ForCausalLM", {"rope_theta": 5e5}, (100352, 4096, 11008, 32, 32, 32), 7298088960),
    "SmolLM2-135M": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "rope_theta": 1e5},
        (49152, 576, 1536, 30, 9, 3),
        134479872,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_their_number_of_weights(name: str) -> None:
    architecture, more, sizes, weights = PUBLISHED[name]
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    raw = dict(zip((*keys, "num_key_value_heads"), sizes, strict=True))
    config = ModelConfig.from_dict({"architectures": [architecture], **raw, **more})
    assert config.num_parameters == weights


def test_phi_names_its_fused_modules() -> None:
    config = parse(architectures=["Phi3ForCausalLM"], partial_rotary_factor=0.75)
    assert config.linear_modules == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert config.module_shape("qkv_proj") == (2048 + 2 * 512, 2048)
    assert config.module_shape("gate_up_proj") == (2 * 8192, 2048)
    assert config.module_path(1, "qkv_proj") == "model.layers.1.self_attn.qkv_proj"
    assert config.module_path(1, "gate_up_proj") == "model.layers.1.mlp.gate_up_proj"
    assert config.rotary_dim == 48


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
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 values"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "much"}}, "yarn is malformed"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "multimodal.*Gemma3ForCausalLM"),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": "wide"}, "sliding_window"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full"]}, "layer_types"),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": -1}, "final_logit_softcapping"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "bidirectional"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.52}, "partial_rotary_factor"),
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
