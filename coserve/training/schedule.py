"""Learning rates by transformers' names and formulas, with its default arguments.

The first optimizer step has step number 1 and uses the factor at 0, as a scheduler that is advanced after
each step does: with a warmup the first learning rate is 0. Every name is a function of the step alone, so
that a resumed job goes on alike; `reduce_lr_on_plateau` and `greedy` of transformers, which follow measured
losses, are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from coserve.errors import InvalidRequest
from coserve.training.job import TrainingSpec

POLYNOMIAL_END = 1e-7  # learning rate at the end
MIN_RATE = 0.1  # cosine_with_min_lr and its kin: part of the learning rate that is left at the end
DECAY_PART = 0.1  # warmup_stable_decay: part of all steps that decays

Factor = Callable[[int, int, int, float], float]


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _linear(step: int, warmup: int, total: int, base: float) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, base: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total))))


def _cosine_with_restarts(step: int, warmup: int, total: int, base: float) -> float:
    progress = _progress(step, warmup, total)
    return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * (progress % 1.0))))


def _cosine_with_min_lr(step: int, warmup: int, total: int, base: float) -> float:
    factor = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, total)))
    return max(0.0, factor * (1 - MIN_RATE) + MIN_RATE)


def _cosine_warmup_with_min_lr(step: int, warmup: int, total: int, base: float) -> float:
    # The one whose warmup and decay count from the first step's end: no step has learning rate 0.
    if step < warmup:
        return (step + 1.0) / max(1, warmup)
    return _cosine_with_min_lr(step + 1, warmup, total, base)


def _polynomial(step: int, warmup: int, total: int, base: float) -> float:
    if step > total:
        return POLYNOMIAL_END / base
    left = 1 - _progress(step, warmup, total)
    return ((base - POLYNOMIAL_END) * left + POLYNOMIAL_END) / base


def _constant(step: int, warmup: int, total: int, base: float) -> float:
    return 1.0


def _inverse_sqrt(step: int, warmup: int, total: int, base: float) -> float:
    timescale = warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def _warmup_stable_decay(step: int, warmup: int, total: int, base: float) -> float:
    decay = math.ceil(total * DECAY_PART)
    stable = total - warmup - decay
    if step < warmup + stable:
        return 1.0
    if step < total:
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup - stable) / max(1, decay))))
    return 0.0


SCHEDULES: dict[str, Factor] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}


class Schedule:
    """The learning rate of each optimizer step of a job with `total_steps` of them.

    `warmup_steps` wins over `warmup_ratio`; `constant` has no warmup. Raises InvalidRequest for an unknown
    name.
    """

    def __init__(self, spec: TrainingSpec, total_steps: int) -> None:
        if spec.lr_scheduler_type not in SCHEDULES:
            raise InvalidRequest(
                f"unknown lr_scheduler_type {spec.lr_scheduler_type!r}: use one of {', '.join(SCHEDULES)}",
                param="training.lr_scheduler_type",
            )
        if spec.lr_scheduler_type == "polynomial" and spec.learning_rate <= POLYNOMIAL_END:
            raise InvalidRequest(
                f"a polynomial schedule needs a learning_rate over {POLYNOMIAL_END}",
                param="training.learning_rate",
            )
        warmup = spec.warmup_steps
        if warmup is None:
            warmup = math.ceil(total_steps * spec.warmup_ratio)
        self.warmup_steps = 0 if spec.lr_scheduler_type == "constant" else warmup
        self.total_steps = total_steps
        self.base = spec.learning_rate
        self._factor = SCHEDULES[spec.lr_scheduler_type]

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, counted from 1."""
        done = step - 1
        if done < self.warmup_steps and self._factor is not _cosine_warmup_with_min_lr:
            return self.base * done / max(1, self.warmup_steps)
        return self.base * self._factor(done, self.warmup_steps, self.total_steps, self.base)
