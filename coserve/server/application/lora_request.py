"""The adapter that a fine-tuning request asks for, in PEFT's words: checked, every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coserve.errors import InvalidRequest
from coserve.lora.peft_config import PeftConfig
from coserve.models.config import HEAD_MODULE, ModelConfig
from coserve.server.fields import Fields, shown
from coserve.training.job import LoraSpec
from coserve.training.lora_settings import resolve_lora

ALL_LINEAR = "all-linear"
_WORDS = (
    "r lora_alpha lora_dropout target_modules rank_pattern alpha_pattern use_rslora init_lora_weights "
    "layers_to_transform peft_type freeze_a exclude_modules "
)
LORA_FIELDS = frozenset(_WORDS.split())
# What an adapter to go on with gives where nothing else is said: what has to stay, and its scale.
_KEPT = ("r", "target_modules", "exclude_modules", "rank_pattern", "layers_to_transform")
_SHAPE = (*_KEPT, "lora_alpha", "alpha_pattern", "use_rslora")
_INIT = {None: "default", True: "default", "": "default", "true": "default", "default": "default"}


def parse_lora(
    fields: Fields, model: ModelConfig, max_rank: int, shape: LoraSpec | None = None
) -> LoraSpec:
    """The adapter's settings, checked against the model.

    With the `shape` of an adapter to go on with, what is absent is that adapter's. Modules and ranks have to
    agree with it; another scale is reached by rescaling its B.
    """
    fields.only(LORA_FIELDS, "lora")
    if shape is not None:
        given = {name: value for name, value in fields.body.items() if value not in (None, [], {})}
        fields = Fields({**{name: getattr(shape, name) for name in _SHAPE}, **given}, fields.path)
    kind = fields.string("peft_type") or "LORA"
    if kind.upper() != "LORA":
        raise fields.fail("peft_type", f"must be LORA; {shown(kind)} is not supported.")
    r = fields.integer("r", 16, 1)
    if r > max_rank:
        raise fields.fail("r", f"must be at most {max_rank} (--max-lora-rank), not {r}.")
    alpha = fields.number("lora_alpha", 2.0 * r, 0.0)
    if alpha == 0.0:
        raise fields.fail("lora_alpha", "must be greater than 0.")
    spec = LoraSpec(
        r=r,
        lora_alpha=alpha,
        target_modules=_target_modules(fields, model.linear_modules),
        exclude_modules=_excluded(fields),
        rank_pattern=_rank_pattern(fields, max_rank),
        alpha_pattern=_alpha_pattern(fields),
        use_rslora=fields.boolean("use_rslora"),
        layers_to_transform=_layers(fields, model.num_layers),
        lora_dropout=_dropout(fields),
        init_lora_weights=_init(fields, shape),
        freeze_a=fields.boolean("freeze_a"),
    )
    resolve_lora(spec, model)
    if shape is not None:
        for name in _KEPT:
            if getattr(spec, name) != getattr(shape, name):
                kept = shown(getattr(shape, name))
                raise fields.fail(
                    name, f"differs from the adapter to go on with ({kept}); leave it out to keep that."
                )
    return spec


def _dropout(fields: Fields) -> float:
    value = fields.number("lora_dropout", 0.0, 0.0, 1.0)
    if value == 1.0:
        raise fields.fail("lora_dropout", "must be below 1.")
    return value


def _init(fields: Fields, shape: LoraSpec | None) -> str:
    raw = fields.raw("init_lora_weights")
    if raw == "gaussian":
        if shape is not None:
            raise fields.fail("init_lora_weights", "says nothing where an adapter is gone on with.")
        return "gaussian"
    if raw is False:
        raise fields.fail(
            "init_lora_weights", "must not be false: random A and B are no adapter to begin with."
        )
    if not isinstance(raw, str | bool | None) or raw not in _INIT:
        raise fields.fail(
            "init_lora_weights",
            f"must be true (PEFT's default) or gaussian; {shown(raw)} is not supported.",
        )
    return _INIT[raw]


def _target_modules(fields: Fields, modules: tuple[str, ...]) -> tuple[str, ...]:
    raw = fields.raw("target_modules")
    if raw is None or raw in ([], ALL_LINEAR, [ALL_LINEAR]):
        return modules
    names = [raw] if isinstance(raw, str) else fields.strings("target_modules") or []
    known = (*modules, HEAD_MODULE)
    for name in names:
        if name not in known:
            raise fields.fail(
                "target_modules", f"has {shown(name)}; this model's modules are {', '.join(known)}."
            )
    return tuple(name for name in known if name in names)


def _excluded(fields: Fields) -> tuple[str, ...]:
    raw = fields.raw("exclude_modules")
    names = [raw] if isinstance(raw, str) and raw else fields.strings("exclude_modules") or []
    return tuple(sorted(set(names)))


def _rank_pattern(fields: Fields, max_rank: int) -> dict[str, int]:
    pattern = fields.object("rank_pattern")
    if pattern is None:
        return {}
    found = {}
    for key in pattern.body:
        rank = pattern.integer(key, None, 1)
        if rank is None or rank > max_rank:
            raise pattern.fail(key, f"must be at most {max_rank} (--max-lora-rank), not {rank}.")
        found[key] = rank
    return found


def _alpha_pattern(fields: Fields) -> dict[str, float]:
    pattern = fields.object("alpha_pattern")
    if pattern is None:
        return {}
    found = {}
    for key in pattern.body:
        alpha = pattern.number(key, 0.0, 0.0)
        if not alpha:
            raise pattern.fail(key, "must be greater than 0.")
        found[key] = alpha
    return found


def _layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    layers = fields.integers("layers_to_transform") or []
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise fields.fail(
                "layers_to_transform", f"has {layer}; the model's layers are 0 to {num_layers - 1}."
            )
    return tuple(sorted(set(layers)))


def lora_of(config: Mapping[str, Any], model: ModelConfig) -> LoraSpec:
    """The shape that a checked adapter_config.json describes."""
    parsed = PeftConfig.parse(config)
    names = {name for path, (layer, name) in model.adapter_places.items() if parsed.targets(path, layer)}
    targets = tuple(name for name in (*model.linear_modules, HEAD_MODULE) if name in names)
    layers, excluded = config.get("layers_to_transform"), config.get("exclude_modules")
    if isinstance(excluded, str):
        raise InvalidRequest(
            "The adapter to go on with excludes modules by a pattern; only names can be gone on with.",
            param="init_from",
        )
    return LoraSpec(
        r=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        target_modules=targets,
        exclude_modules=tuple(sorted(excluded or ())),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        use_rslora=bool(config.get("use_rslora")),
        layers_to_transform=tuple([layers] if isinstance(layers, int) else layers or ()),
    )
