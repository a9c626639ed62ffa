"""The rotary embedding that config.json asks for, in the form of transformers 4 or 5. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from coserve.errors import ConfigError

KINDS = ("default", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary frequencies.

    `kind` "linear": all by `factor`; "llama3": low frequencies only (Llama 3.1); "yarn": a ramp between the
    turns `low_freq_factor` and `high_freq_factor` (Peng et al. 2023); "longrope": by `long_factors`, or
    `short_factors` in a context of at most the original (Ding et al. 2024). cos and sin are multiplied by
    `attention_factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = field(default=(), repr=False)
    long_factors: tuple[float, ...] = field(default=(), repr=False)

    @property
    def context(self) -> int:
        """Positions that the stretching alone makes room for; files with "yarn" keep naming the original."""
        return int(self.original_max_position_embeddings * self.factor) if self.kind == "yarn" else 0


def rope_fields(raw: dict[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary settings of a layer type: transformers 5 nests them where they differ by layer."""
    fields = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    nested = fields.get(layer_type)
    return nested if isinstance(nested, dict) else fields


def rotary_dim(raw: dict[str, Any], head_dim: int) -> int:
    """Features of a head that are rotated. Raises ConfigError unless they are pairs."""
    fields = rope_fields(raw)
    part = float(fields.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    dim = int(head_dim * part)
    if not 0 < dim <= head_dim or dim % 2:
        raise ConfigError(
            f"head_dim {head_dim} with partial_rotary_factor {part} rotates {dim} features; rotary embedding "
            "needs pairs.",
            param="model",
        )
    return dim


def parse_scaling(raw: dict[str, Any], dim: int, longest: int, family: str) -> RopeScaling | None:
    """The scaling of the (global) rotary embedding; None: not stretched. Raises ConfigError by name."""
    fields = rope_fields(raw)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # names of early files
    if kind == "default":
        return None
    if kind not in KINDS:
        raise ConfigError(f"rope scaling {kind!r} is not supported; {', '.join(KINDS)} are.", param="model")
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    try:
        if kind == "linear":
            return RopeScaling("linear", float(fields["factor"]))
        if kind == "llama3":
            return RopeScaling(
                "llama3",
                float(fields["factor"]),
                float(fields["low_freq_factor"]),
                float(fields["high_freq_factor"]),
                int(fields["original_max_position_embeddings"]),
            )
        if kind == "yarn":
            return _yarn(fields, int(original or longest), longest)
        return _longrope(fields, dim, int(original or longest), longest)
    except KeyError as error:
        raise ConfigError(f"config.json: rope scaling lacks {error.args[0]}.", param="model") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json: rope scaling {kind} is malformed: {error}", param="model") from error


def _yarn(fields: dict[str, Any], original: int, longest: int) -> RopeScaling:
    factor = float(fields.get("factor") or longest / original)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = fields.get("attention_factor")
    if attention is None:
        top, bottom = fields.get("mscale"), fields.get("mscale_all_dim")
        attention = magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
    return RopeScaling(
        "yarn",
        factor,
        float(fields.get("beta_slow") or 1.0),
        float(fields.get("beta_fast") or 32.0),
        original,
        float(attention),
        bool(fields.get("truncate", True)),
    )


def _longrope(fields: dict[str, Any], dim: int, original: int, longest: int) -> RopeScaling:
    lists = []
    for name in ("short_factor", "long_factor"):
        factors = tuple(float(value) for value in fields[name])
        if len(factors) != dim // 2:
            raise ConfigError(
                f"config.json: {name} has {len(factors)} values, {dim // 2} frequencies are rotated.",
                param="model",
            )
        lists.append(factors)
    factor = float(fields.get("factor") or longest / original)
    attention = fields.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original_max_position_embeddings=original,
        attention_factor=float(attention),
        short_factors=lists[0],
        long_factors=lists[1],
    )
