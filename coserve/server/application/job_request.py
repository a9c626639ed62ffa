"""A fine-tuning request checked field by field, every default filled in.

The body is the gRPC request's as a plain dictionary; HTTP's OpenAI fields are brought into that form first.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.errors import InvalidRequest
from coserve.lora.peft_config import PeftConfig
from coserve.lora.peft_files import make_config
from coserve.models.config import ModelConfig
from coserve.server.fields import Fields, shown
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.schedule import POLYNOMIAL_END, SCHEDULES

DEFAULT_LEARNING_RATE = TrainingSpec().learning_rate
METHODS = ("supervised",)
ALL_LINEAR = "all-linear"
MAX_SEED = 2**31 - 1

_REQUEST_WORDS = (
    "model training_file validation_file adapter suffix method lora training seed init_from metadata "
    "priority idempotency_key "
)
_REQUEST_FIELDS = frozenset(_REQUEST_WORDS.split())
_LORA_WORDS = (
    "r lora_alpha lora_dropout target_modules rank_pattern alpha_pattern use_rslora init_lora_weights "
    "layers_to_transform peft_type "
)
_LORA_FIELDS = frozenset(_LORA_WORDS.split())
_TRAINING_WORDS = (
    "n_epochs max_steps batch_size learning_rate learning_rate_multiplier lr_scheduler_type warmup_steps "
    "warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm max_length packing "
    "shuffle optimizer beta label_smoothing checkpoint_steps eval_steps early_stopping_patience "
    "window_tokens "
)
_TRAINING_FIELDS = frozenset(_TRAINING_WORDS.split())


@dataclass(frozen=True)
class JobRequest:
    """A valid request. `lora` None: the default, or the shape of the adapter to go on with."""

    model: str
    training_file: str
    adapter: str
    suffix: str
    method: str
    lora: LoraSpec | None
    training: TrainingSpec
    seed: int
    init_from: str
    metadata: dict[str, str]
    priority: int
    idempotency_key: str
    digest: str


def parse_job_request(body: object, model: ModelConfig, max_rank: int, max_model_len: int) -> JobRequest:
    """Check a request; InvalidRequest names the field, unknown ones too."""
    fields = Fields(body)
    fields.only(_REQUEST_FIELDS, "the job")
    if fields.string("validation_file"):
        raise fields.fail(
            "validation_file", "is not supported: this server doesn't evaluate while it trains."
        )
    method = fields.string("method") or "supervised"
    if method not in METHODS:
        raise fields.fail("method", f"must be {' or '.join(METHODS)}; {shown(method)} is not supported.")
    lora = fields.object("lora")
    training = fields.object("training") or Fields({}, "training.")
    seed = fields.integer("seed", None, 0, MAX_SEED)
    return JobRequest(
        model=fields.string("model") or "",
        training_file=fields.required_string("training_file"),
        adapter=fields.string("adapter") or "",
        suffix=fields.string("suffix", "", 64) or "",
        method=method,
        lora=parse_lora(lora, model, max_rank) if lora is not None else None,
        training=parse_training(training, max_model_len),
        seed=seed if seed is not None else secrets.randbelow(MAX_SEED),
        init_from=fields.string("init_from") or "",
        metadata=_metadata(fields),
        priority=fields.integer("priority", 0, -(2**31), 2**31 - 1) or 0,
        idempotency_key=fields.string("idempotency_key", "", 255) or "",
        digest=hashlib.sha256(json.dumps(fields.body, sort_keys=True, default=str).encode()).hexdigest(),
    )


def _metadata(fields: Fields) -> dict[str, str]:
    metadata = fields.object("metadata")
    if metadata is None:
        return {}
    if len(metadata.body) > 16:
        raise fields.fail("metadata", f"must have at most 16 pairs, not {len(metadata.body)}.")
    for key in metadata.body:
        if len(key) > 64:
            raise fields.fail("metadata", "has a key of over 64 characters.")
    return {key: metadata.string(key, "", 512) or "" for key in metadata.body}


def parse_lora(fields: Fields, model: ModelConfig, max_rank: int) -> LoraSpec:
    """The adapter's shape with defaults resolved, checked against the model."""
    fields.only(_LORA_FIELDS, "lora")
    kind = fields.string("peft_type") or "LORA"
    if kind.upper() != "LORA":
        raise fields.fail("peft_type", f"must be LORA; {shown(kind)} is not supported.")
    if fields.number("lora_dropout", 0.0, 0.0, 1.0):
        raise fields.fail("lora_dropout", "must be 0: dropout is not supported.")
    if fields.raw("init_lora_weights") not in (None, True, "", "default", "true"):
        raise fields.fail("init_lora_weights", "must be true (PEFT's default); other ways are not supported.")
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
        rank_pattern=_pattern(fields, "rank_pattern", max_rank),
        alpha_pattern=_alpha_pattern(fields),
        use_rslora=fields.boolean("use_rslora"),
        layers_to_transform=_layers(fields, model.num_layers),
    )
    _check_patterns(spec, model)
    return spec


def default_lora(model: ModelConfig, max_rank: int) -> LoraSpec:
    """The shape of a job that says nothing about it."""
    return parse_lora(Fields({}, "lora."), model, max_rank)


def _target_modules(fields: Fields, modules: tuple[str, ...]) -> tuple[str, ...]:
    raw = fields.raw("target_modules")
    if raw is None or raw == [] or raw == ALL_LINEAR or raw == [ALL_LINEAR]:
        return modules
    names = [raw] if isinstance(raw, str) else fields.strings("target_modules") or []
    for name in names:
        if name not in modules:
            raise fields.fail(
                "target_modules", f"has {shown(name)}; this model's modules are {', '.join(modules)}."
            )
    return tuple(name for name in modules if name in names)


def _pattern(fields: Fields, name: str, max_rank: int) -> dict[str, int]:
    pattern = fields.object(name)
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


def _check_patterns(spec: LoraSpec, model: ModelConfig) -> None:
    """Every pattern must match a module that is adapted, as PEFT would match it."""
    config = PeftConfig.parse(peft_config(spec))
    layers = {
        model.module_path(layer, name): layer
        for layer in range(model.num_layers)
        for name in model.linear_modules
    }
    adapted = {path: layer for path, layer in layers.items() if config.targets(path, layer)}
    try:
        config.check_names(layers, adapted)
    except InvalidRequest as error:
        raise InvalidRequest(f"lora: {error.message}", param="lora") from None


def peft_config(spec: LoraSpec, base_model_name: str = "") -> dict[str, Any]:
    """The adapter_config.json that this shape has."""
    return make_config(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        target_modules=spec.target_modules,
        base_model_name=base_model_name,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        use_rslora=spec.use_rslora,
        layers_to_transform=spec.layers_to_transform,
    )


def lora_of(config: Mapping[str, Any], model: ModelConfig) -> LoraSpec:
    """The shape that a checked adapter_config.json describes."""
    parsed = PeftConfig.parse(config)
    targets = tuple(
        name
        for name in model.linear_modules
        if any(parsed.targets(model.module_path(layer, name), layer) for layer in range(model.num_layers))
    )
    layers = config.get("layers_to_transform")
    return LoraSpec(
        r=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        target_modules=targets,
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        use_rslora=bool(config.get("use_rslora")),
        layers_to_transform=tuple([layers] if isinstance(layers, int) else layers or ()),
    )


def parse_training(fields: Fields, max_model_len: int) -> TrainingSpec:
    """Optimisation settings with defaults resolved."""
    fields.only(_TRAINING_FIELDS, "training")
    for name in ("eval_steps", "early_stopping_patience", "beta", "label_smoothing"):
        if fields.number(name):
            raise fields.fail(name, "is not supported.")
    optimizer = fields.string("optimizer") or "adamw"
    if optimizer != "adamw":
        raise fields.fail("optimizer", f"must be adamw; {shown(optimizer)} is not supported.")
    if not fields.boolean("packing", True):
        raise fields.fail("packing", "false is not supported: samples share batches, never attention.")
    defaults = TrainingSpec()
    epsilon = fields.number("adam_epsilon", defaults.adam_epsilon, 0.0)
    if epsilon == 0.0:
        raise fields.fail("adam_epsilon", "must be greater than 0.")
    rate, schedule = _learning_rate(fields), fields.string("lr_scheduler_type")
    if schedule == "polynomial" and rate <= POLYNOMIAL_END:
        raise fields.fail("learning_rate", f"must be over {POLYNOMIAL_END:g} with a polynomial schedule.")
    window = fields.integer("window_tokens", 0, 0) or 0
    return TrainingSpec(
        n_epochs=fields.integer("n_epochs", defaults.n_epochs, 1, 10_000),
        max_steps=fields.integer("max_steps", defaults.max_steps, 0, 10**9),
        batch_size=fields.integer("batch_size", defaults.batch_size, 1, 65_536),
        learning_rate=rate,
        lr_scheduler_type=fields.choice("lr_scheduler_type", tuple(SCHEDULES), defaults.lr_scheduler_type),
        warmup_steps=fields.integer("warmup_steps", None, 0),
        warmup_ratio=fields.number("warmup_ratio", defaults.warmup_ratio, 0.0, 1.0),
        weight_decay=fields.number("weight_decay", defaults.weight_decay, 0.0),
        adam_beta1=_beta(fields, "adam_beta1", defaults.adam_beta1),
        adam_beta2=_beta(fields, "adam_beta2", defaults.adam_beta2),
        adam_epsilon=epsilon,
        max_grad_norm=fields.number("max_grad_norm", defaults.max_grad_norm, 0.0),
        max_length=_max_length(fields, max_model_len),
        shuffle=fields.boolean("shuffle", defaults.shuffle),
        optimizer=optimizer,
        checkpoint_steps=fields.integer("checkpoint_steps", 0, 0),
        window_tokens=window,
    )


def _learning_rate(fields: Fields) -> float:
    rate = fields.number("learning_rate", None, 0.0)
    multiplier = fields.number("learning_rate_multiplier", None, 0.0)
    if rate is not None and multiplier is not None:
        raise fields.fail("learning_rate_multiplier", "can't be combined with learning_rate.")
    if multiplier is not None:
        return DEFAULT_LEARNING_RATE * multiplier
    return DEFAULT_LEARNING_RATE if rate is None else rate


def _beta(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default, 0.0, 1.0)
    if value == 1.0:
        raise fields.fail(name, "must be below 1.")
    return value


def _max_length(fields: Fields, max_model_len: int) -> int:
    length = fields.integer("max_length", 0, 0, max_model_len) or 0
    return length or max_model_len
