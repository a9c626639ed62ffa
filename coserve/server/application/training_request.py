"""The optimisation settings that a fine-tuning request asks for: checked, every default filled in."""

from __future__ import annotations

from coserve.server.fields import Fields, shown
from coserve.training.job import TrainingSpec
from coserve.training.methods import check_method
from coserve.training.schedule import POLYNOMIAL_END, SCHEDULES

DEFAULTS = TrainingSpec()
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_SGD = ("momentum",)
_WORDS = (
    "n_epochs max_steps batch_size learning_rate learning_rate_multiplier lr_scheduler_type warmup_steps "
    "warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm max_length packing "
    "shuffle optimizer momentum loraplus_lr_ratio beta label_smoothing kl_coef checkpoint_steps eval_steps "
    "early_stopping_patience early_stopping_threshold window_tokens validation_split auto "
)
TRAINING_FIELDS = frozenset(_WORDS.split())
# What may be left to the server, which then decides by the amount of data (auto_settings.py).
AUTO = ("n_epochs", "batch_size", "learning_rate_multiplier")


def parse_training(
    fields: Fields, max_model_len: int, method: str, validation_file: bool
) -> TrainingSpec:
    """Settings of a job of this `method` with defaults resolved; those that `auto` names keep theirs for now.

    `validation_file` says whether the job has one.
    """
    fields.only(TRAINING_FIELDS, "training")
    schedule = fields.choice("lr_scheduler_type", tuple(SCHEDULES), DEFAULTS.lr_scheduler_type)
    rate = _learning_rate(fields)
    if schedule == "polynomial" and rate <= POLYNOMIAL_END:
        raise fields.fail("learning_rate", f"must be over {POLYNOMIAL_END:g} with a polynomial schedule.")
    training = TrainingSpec(
        n_epochs=fields.integer("n_epochs", DEFAULTS.n_epochs, 1, 10_000),
        max_steps=fields.integer("max_steps", DEFAULTS.max_steps, 0, 10**9),
        batch_size=fields.integer("batch_size", DEFAULTS.batch_size, 1, 65_536),
        learning_rate=rate,
        lr_scheduler_type=schedule,
        warmup_steps=fields.integer("warmup_steps", None, 0),
        warmup_ratio=fields.number("warmup_ratio", DEFAULTS.warmup_ratio, 0.0, 1.0),
        weight_decay=fields.number("weight_decay", DEFAULTS.weight_decay, 0.0),
        adam_beta1=_below_one(fields, "adam_beta1", DEFAULTS.adam_beta1),
        adam_beta2=_below_one(fields, "adam_beta2", DEFAULTS.adam_beta2),
        adam_epsilon=_above_zero(fields, "adam_epsilon", DEFAULTS.adam_epsilon),
        max_grad_norm=fields.number("max_grad_norm", DEFAULTS.max_grad_norm, 0.0),
        max_length=fields.integer("max_length", 0, 0, max_model_len) or max_model_len,
        packing=fields.boolean("packing", DEFAULTS.packing),
        shuffle=fields.boolean("shuffle", DEFAULTS.shuffle),
        optimizer=fields.choice("optimizer", OPTIMIZERS, DEFAULTS.optimizer),
        momentum=_below_one(fields, "momentum", DEFAULTS.momentum),
        loraplus_lr_ratio=_above_zero(fields, "loraplus_lr_ratio", DEFAULTS.loraplus_lr_ratio),
        checkpoint_steps=fields.integer("checkpoint_steps", 0, 0),
        window_tokens=fields.integer("window_tokens", 0, 0),
        validation_split=_below_one(fields, "validation_split", DEFAULTS.validation_split),
        eval_steps=fields.integer("eval_steps", DEFAULTS.eval_steps, 0),
        early_stopping_patience=fields.integer("early_stopping_patience", 0, 0, 10**6),
        early_stopping_threshold=fields.number("early_stopping_threshold", 0.0, 0.0),
        label_smoothing=_below_one(fields, "label_smoothing", DEFAULTS.label_smoothing),
        beta=_above_zero(fields, "beta", DEFAULTS.beta),
        kl_coef=fields.number("kl_coef", DEFAULTS.kl_coef, 0.0),
    )
    check_method(method, training)
    _refuse_without_effect(fields, training, method, validation_file)
    return training


def parse_auto(fields: Fields) -> tuple[str, ...]:
    """The settings that are left to the server, in the order of `AUTO`."""
    names = fields.strings("auto") or []
    for name in names:
        if name not in AUTO:
            raise fields.fail("auto", f"must name some of {', '.join(AUTO)}; not {shown(name)}.")
        if fields.has(name) or (name == "learning_rate_multiplier" and fields.has("learning_rate")):
            raise fields.fail("auto", f"names {name}, which is given as well; leave one out.")
    return tuple(name for name in AUTO if name in names)


def _refuse_without_effect(
    fields: Fields, training: TrainingSpec, method: str, validation_file: bool
) -> None:
    """What is said of something that the job won't have."""
    idle: dict[str, str] = {}
    for name in _ADAM if training.optimizer == "sgd" else _SGD:
        idle[name] = f"says nothing of the optimizer {training.optimizer}; leave it out."
    if method != "dpo":
        idle["beta"] = f"belongs to the method dpo, not to {method}; leave it out."
    if validation_file:
        idle["validation_split"] = "says nothing where there is a validation_file; leave one out."
    elif not training.validation_split:
        reason = "needs something to evaluate: give a validation_file or training.validation_split."
        idle |= dict.fromkeys(("eval_steps", "early_stopping_patience"), reason)
    if not training.early_stopping_patience:
        idle["early_stopping_threshold"] = "needs early_stopping_patience."
    for name, reason in idle.items():
        if fields.has(name) and getattr(training, name) != getattr(DEFAULTS, name):
            raise fields.fail(name, reason)


def _learning_rate(fields: Fields) -> float:
    rate = fields.number("learning_rate", None, 0.0)
    multiplier = fields.number("learning_rate_multiplier", None, 0.0)
    if rate is not None and multiplier is not None:
        raise fields.fail("learning_rate_multiplier", "can't be combined with learning_rate.")
    if multiplier is not None:
        return DEFAULTS.learning_rate * multiplier
    return DEFAULTS.learning_rate if rate is None else rate


def _above_zero(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default, 0.0)
    if value == 0.0:
        raise fields.fail(name, "must be greater than 0.")
    return value


def _below_one(fields: Fields, name: str, default: float) -> float:
    value = fields.number(name, default, 0.0, 1.0)
    if value == 1.0:
        raise fields.fail(name, "must be below 1.")
    return value
