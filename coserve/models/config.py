"""What a model directory's config.json says, for every family that the decoder knows. Torch-free.

A family is one line of `FAMILIES`: which projections carry a bias and whether q and k are normed. All else is
read from the file, in the form of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.errors import ConfigError

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """How an architecture differs from plain Llama.

    `qkv_bias` and `o_bias` None follow `attention_bias` of the file; `fused` families have one matrix for
    q, k and v and one for gate and up, which an adapter then sits on as a whole.
    """

    name: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    default_head_dim: int | None = None
    fused: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", qkv_bias=False, o_bias=False),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, o_bias=False),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, default_head_dim=128),
}


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies: `kind` "linear" (all by `factor`) or "llama3" (low frequencies only)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. `max_position_embeddings` is already capped at a sliding window, inside which
    windowed and full attention are the same."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "float32"
    hidden_act: str = "silu"
    fused: bool = False

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read a Hugging Face model directory.

        Raises ConfigError for a directory that isn't one, has no safetensors, or holds a model that isn't
        supported, naming the reason.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is not a directory; give a Hugging Face model directory.", param="model"
            )
        raw = _read_json(folder / "config.json")
        if raw is None:
            raise ConfigError(f"{folder} has no config.json; is it a model directory?", param="model")
        if not any(folder.glob("*.safetensors")):
            pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            hint = " (pickled weights are never loaded: convert them to safetensors)" if pickles else ""
            raise ConfigError(f"{folder} has no *.safetensors file{hint}.", param="model")
        return cls.from_dict(raw, _read_json(folder / "generation_config.json") or {})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        """From config.json's (and generation_config.json's) contents. Raises ConfigError by name."""
        family = _family(raw)
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        kv_heads = _positive(raw, "num_key_value_heads", heads)
        head_dim = raw.get("head_dim") or family.default_head_dim or hidden // heads
        if heads % kv_heads:
            raise ConfigError(f"num_key_value_heads {kv_heads} doesn't divide {heads} heads.", param="model")
        if head_dim % 2:
            raise ConfigError(f"head_dim {head_dim} is odd; rotary embedding needs pairs.", param="model")
        act = raw.get("hidden_act", "silu")
        if act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {act!r} is not supported; {_listed(ACTIVATIONS)} are.", param="model"
            )
        theta, scaling = _rope(raw)
        bias = bool(raw.get("attention_bias", False))
        window = _sliding_window(raw, family)
        longest = _positive(raw, "max_position_embeddings", 2048)
        return cls(
            family=family.name,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=int(head_dim),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and family.name == "llama",
            qk_norm=family.qk_norm,
            max_position_embeddings=min(longest, window or longest),
            sliding_window=window,
            eos_token_ids=_eos_ids(generation or {}, raw),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            hidden_act=ACTIVATIONS[act],
            fused=family.fused,
        )

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """Names of a block's linears; a module's number, everywhere, is its place in here."""
        return FUSED_MODULES if self.fused else LINEAR_MODULES

    @property
    def q_size(self) -> int:
        """Features of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of the key, and of the value, projection."""
        return self.num_kv_heads * self.head_dim

    def module_shape(self, name: str) -> tuple[int, int]:
        """(out, in) features of one of `linear_modules`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "qkv_proj": (self.q_size + 2 * self.kv_size, hidden),
            "gate_up_proj": (2 * inner, hidden),
            "q_proj": (self.q_size, hidden),
            "k_proj": (self.kv_size, hidden),
            "v_proj": (self.kv_size, hidden),
            "o_proj": (hidden, self.q_size),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }[name]

    def module_path(self, layer: int, name: str) -> str:
        """The module's dotted path in transformers, e.g. "model.layers.0.self_attn.q_proj"."""
        block = "mlp" if name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
        return f"model.layers.{layer}.{block}.{name}"

    @property
    def num_parameters(self) -> int:
        """Weights of the model (biases and norms left out), the tied head counted once."""
        linear = sum(out * into for out, into in map(self.module_shape, self.linear_modules))
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return linear * self.num_layers + tables


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} is not valid JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} is not a JSON object.", param="model")
    return value


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _family(raw: dict[str, Any]) -> Family:
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            break
    else:
        by_type = {family.name: name for name, family in FAMILIES.items()}
        architecture = by_type.get(raw.get("model_type", "")) if not named else None
    if architecture is None:
        what = ", ".join(named) or raw.get("model_type") or "unnamed"
        raise ConfigError(f"architecture {what} is not supported; {_listed(FAMILIES)} are.", param="model")
    if raw.get("quantization_config"):
        raise ConfigError("quantized checkpoints are not supported; use the original weights.", param="model")
    return FAMILIES[architecture]


def _positive(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive integer, not {value!r}.", param="model")
    return value


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    fields = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(fields.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if float(fields.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported.", param="model")
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", float(fields["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                float(fields["factor"]),
                float(fields["low_freq_factor"]),
                float(fields["high_freq_factor"]),
                int(fields["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ConfigError(f"config.json: rope scaling lacks {error.args[0]}.", param="model") from error
    raise ConfigError(
        f"rope scaling {kind!r} is not supported; default, linear and llama3 are.", param="model"
    )


def _sliding_window(raw: dict[str, Any], family: Family) -> int | None:
    if family.name == "mistral":
        used, default = True, 4096  # transformers' default where the key is missing
    else:
        used, default = bool(raw.get("use_sliding_window")), None
    if not used or raw.get("sliding_window", default) is None:
        return None
    return _positive(raw, "sliding_window", default)


def _eos_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found += [i for i in ids if isinstance(i, int) and i not in found]
    return tuple(found)
