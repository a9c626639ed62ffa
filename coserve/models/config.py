"""What a model directory's config.json says, for every family that the decoder knows. Torch-free.

How the families differ is in families.py; all else is read from the file, in the form of transformers 4
(`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.errors import ConfigError
from coserve.models.families import Family, find_family, layer_windows
from coserve.models.rope_settings import RopeScaling, parse_scaling, rope_fields, rotary_dim

HEAD_MODULE = "lm_head"
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, and what its family does differently (see `families.Family`).

    `layer_windows` holds for each layer how many keys its queries see, 0 for all of them; empty: all see all.
    `query_scalar` 0 stands for `head_dim`, `rotary_features` 0 for all features of a head, a cap 0 for none.
    """

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
    layer_windows: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "float32"
    hidden_act: str = "silu"
    fused: bool = False
    whole_qk_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    wide_norms: bool = False
    scaled_embeddings: bool = False
    query_scalar: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    rotary_features: int = 0
    local_rope_theta: float | None = None

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
        family = find_family(raw)
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        layers, kv_heads = _positive(raw, "num_hidden_layers"), _positive(raw, "num_key_value_heads", heads)
        head_dim = _positive(raw, "head_dim", family.default_head_dim or hidden // heads)
        if heads % kv_heads:
            raise ConfigError(f"num_key_value_heads {kv_heads} doesn't divide {heads} heads.", param="model")
        rotated, longest = rotary_dim(raw, head_dim), _positive(raw, "max_position_embeddings", 2048)
        scaling = parse_scaling(raw, rotated, longest, family.name)
        bias = bool(raw.get("attention_bias", False))
        tied = raw.get("tie_word_embeddings")
        return cls(
            family=family.name,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", family.default_eps)),
            rope_theta=_theta(rope_fields(raw), raw, "rope_theta", family.default_rope_theta),
            rope_scaling=scaling,
            tie_word_embeddings=family.tied_by_default if tied is None else bool(tied),
            attention_bias=bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=family.mlp_bias and bool(raw.get("mlp_bias", False)),
            qk_norm=bool(family.qk_norm),
            max_position_embeddings=max(longest, scaling.context if scaling else 0),
            layer_windows=layer_windows(raw, family, layers),
            eos_token_ids=_eos_ids(generation or {}, raw),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            hidden_act=_activation(raw, family),
            fused=family.fused,
            whole_qk_norm=family.qk_norm == "whole",
            pre_norms=family.pre_norms,
            post_norms=family.post_norms,
            norm_offset=family.norm_offset,
            wide_norms=family.wide_norms,
            scaled_embeddings=family.scaled_embeddings,
            query_scalar=_query_scalar(raw, family),
            attention_cap=_cap(raw, "attn_logit_softcapping", family.attention_cap),
            logit_cap=_cap(raw, "final_logit_softcapping", family.logit_cap),
            rotary_features=rotated if rotated != head_dim else 0,
            local_rope_theta=_local_theta(raw, family),
        )

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return self.rotary_features or self.head_dim

    @property
    def attention_scale(self) -> float:
        """What q . k is multiplied by."""
        return float((self.query_scalar or self.head_dim) ** -0.5)

    def window(self, layer: int) -> int:
        """Keys that a query of this layer sees, its own among them; 0: all before it."""
        window = self.layer_windows[layer] if self.layer_windows else 0
        return window if window < self.max_position_embeddings else 0

    def slides(self, layer: int) -> bool:
        """The layer is one of sliding attention, whether or not its window is shorter than the context."""
        return bool(self.layer_windows) and self.layer_windows[layer] > 0

    @property
    def linear_modules(self) -> tuple[str, ...]:
        """Names of a block's linears; a module's number, everywhere, is its place in here."""
        return FUSED_MODULES if self.fused else LINEAR_MODULES

    @property
    def adapter_places(self) -> dict[str, tuple[int, str]]:
        """Path -> (layer, name) of every linear that an adapter may sit on: those of the blocks, then the
        head, whose layer is `num_layers`."""
        blocks = ((layer, name) for layer in range(self.num_layers) for name in self.linear_modules)
        return {self.module_path(*place): place for place in (*blocks, (self.num_layers, HEAD_MODULE))}

    @property
    def q_size(self) -> int:
        """Features of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of the key, and of the value, projection."""
        return self.num_kv_heads * self.head_dim

    def module_shape(self, name: str) -> tuple[int, int]:
        """(out, in) features of one of `linear_modules`, or of the head."""
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
            HEAD_MODULE: (self.vocab_size, hidden),
        }[name]

    def module_path(self, layer: int, name: str) -> str:
        """The module's dotted path in transformers, e.g. "model.layers.0.self_attn.q_proj"."""
        if name == HEAD_MODULE:
            return name
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


def _positive(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive integer, not {value!r}.", param="model")
    return value


def _number(raw: dict[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive number, not {value!r}.", param="model")
    return float(value)


def _theta(fields: dict[str, Any], raw: dict[str, Any], old_key: str, default: float) -> float:
    return _number(fields, "rope_theta", 0.0) or _number(raw, old_key, default)


def _activation(raw: dict[str, Any], family: Family) -> str:
    act = raw.get(family.act_key) or family.default_act
    if act not in ACTIVATIONS:
        raise ConfigError(
            f"{family.act_key} {act!r} is not supported; {', '.join(sorted(ACTIVATIONS))} are.", param="model"
        )
    return ACTIVATIONS[act]


def _query_scalar(raw: dict[str, Any], family: Family) -> float:
    if family.default_query_scalar is None:
        return 0.0
    return _number(raw, "query_pre_attn_scalar", family.default_query_scalar)


def _cap(raw: dict[str, Any], key: str, default: float | None) -> float:
    """0 in a family without this cap, and where the file says null."""
    if default is None or (key in raw and raw[key] is None):
        return 0.0
    return _number(raw, key, default)


def _local_theta(raw: dict[str, Any], family: Family) -> float | None:
    if family.local_rope_theta is None:
        return None
    nested = (raw.get("rope_parameters") or {}).get("sliding_attention") or {}
    kind = nested.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"rope scaling {kind!r} on sliding layers is not supported.", param="model")
    return _theta(nested, raw, "rope_local_base_freq", family.local_rope_theta)


def _eos_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    found: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found += [i for i in ids if isinstance(i, int) and i not in found]
    return tuple(found)
