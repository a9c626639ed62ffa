"""How each architecture differs from plain Llama. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coserve.errors import ConfigError

WindowRule = Literal["none", "all", "qwen", "alternate", "pattern"]


@dataclass(frozen=True)
class Family:
    """One architecture, by what its transformers implementation does differently.

    `qkv_bias` and `o_bias` None follow `attention_bias` of the file. `fused`: one matrix for q, k and v and
    one for gate and up, which an adapter then sits on as a whole. `qk_norm` "head" norms each head, "whole"
    the whole projection. `norm_offset` is added to every norm's weight; `wide_norms` multiply by it before
    they round. `windows` says which layers see a sliding window, `default_window` its length where the file
    is silent. The caps are the defaults where the file is silent; None: the family has none.
    """

    name: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool = False
    fused: bool = False
    qk_norm: Literal["", "head", "whole"] = ""
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    wide_norms: bool = False
    scaled_embeddings: bool = False
    tied_by_default: bool = False
    act_key: str = "hidden_act"
    default_act: str = "silu"
    default_head_dim: int | None = None
    default_query_scalar: float | None = None
    default_eps: float = 1e-6
    windows: WindowRule = "none"
    default_window: int | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    local_rope_theta: float | None = None
    default_rope_theta: float = 10000.0


_GEMMA: dict[str, Any] = {
    "post_norms": True,
    "norm_offset": 1.0,
    "wide_norms": True,
    "scaled_embeddings": True,
    "tied_by_default": True,
    "act_key": "hidden_activation",
    "default_act": "gelu_pytorch_tanh",
    "default_head_dim": 256,
    "default_query_scalar": 256.0,
    "default_window": 4096,
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", mlp_bias=True),
    "MistralForCausalLM": Family("mistral", qkv_bias=False, o_bias=False, windows="all", default_window=4096),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, o_bias=False, windows="qwen", default_window=4096),
    "Qwen3ForCausalLM": Family(
        "qwen3", qk_norm="head", default_head_dim=128, windows="qwen", default_window=4096
    ),
    "Gemma2ForCausalLM": Family("gemma2", **_GEMMA, windows="alternate", attention_cap=50.0, logit_cap=30.0),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        **_GEMMA,
        qk_norm="head",
        windows="pattern",
        logit_cap=0.0,
        local_rope_theta=10000.0,
        default_rope_theta=1e6,
    ),
    "Phi3ForCausalLM": Family(
        "phi3", qkv_bias=False, o_bias=False, fused=True, windows="all", default_eps=1e-5
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", qk_norm="whole", pre_norms=False, post_norms=True, wide_norms=True, default_eps=1e-5
    ),
}
# Architectures around a text model that is known here: why they aren't loaded, and what would be.
_WRAPPERS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Phi4MultimodalForCausalLM": "Phi3ForCausalLM",
}


def find_family(raw: dict[str, Any]) -> Family:
    """The family that config.json names. Raises ConfigError by name for any other."""
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            break
    else:
        by_type = {family.name: name for name, family in FAMILIES.items()}
        architecture = by_type.get(raw.get("model_type", "")) if not named else None
    for wrapper in named:
        if wrapper in _WRAPPERS:
            raise ConfigError(
                f"{wrapper} is multimodal, and only text models are supported; save its language model "
                f"alone as a {_WRAPPERS[wrapper]}.",
                param="model",
            )
    if architecture is None:
        what = ", ".join(named) or raw.get("model_type") or "unnamed"
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"architecture {what} is not supported; {known} are.", param="model")
    if raw.get("quantization_config"):
        raise ConfigError("quantized checkpoints are not supported; use the original weights.", param="model")
    if raw.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention is not supported: decoding is causal.", param="model")
    return FAMILIES[architecture]


def layer_windows(raw: dict[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    """Keys that each layer's queries see, their own among them; 0 is all.

    Raises ConfigError for a window that isn't a positive integer and for layer types that don't fit.
    """
    window = raw.get("sliding_window", family.default_window)
    if family.windows == "none" or window is None:
        return (0,) * layers
    if family.windows == "qwen" and not raw.get("use_sliding_window"):
        return (0,) * layers
    if type(window) is not int or window <= 0:
        raise ConfigError(
            f"config.json: sliding_window must be a positive integer, not {window!r}.", param="model"
        )
    return tuple(window if slides else 0 for slides in _sliding_layers(raw, family, layers))


def _sliding_layers(raw: dict[str, Any], family: Family, layers: int) -> list[bool]:
    if family.windows == "all":
        return [True] * layers
    types = raw.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or not all(t in known for t in types):
            raise ConfigError(
                f"config.json: layer_types must have one of {', '.join(known)} for each of {layers} layers.",
                param="model",
            )
        return [kind == "sliding_attention" for kind in types]
    if family.windows == "qwen":
        first = raw.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ConfigError(
                f"config.json: max_window_layers must be an integer, not {first!r}.", param="model"
            )
        return [layer >= first for layer in range(layers)]
    period = raw.get("sliding_window_pattern", 6) if family.windows == "pattern" else 2
    if type(period) is not int or period <= 0:
        raise ConfigError(
            f"config.json: sliding_window_pattern must be a positive integer, not {period!r}.", param="model"
        )
    return [(layer + 1) % period != 0 for layer in range(layers)]
