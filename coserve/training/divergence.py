"""When training goes wrong: steps that aren't finite, losses that explode, settings that will make them."""

from __future__ import annotations

from coserve.errors import FailedPrecondition
from coserve.training.job import TrainingSpec

# Over these LoRA hardly survives; SGD's updates scale with the gradient, so its limit is another.
HIGH_RATE = {"adamw": 1e-2, "adamw_8bit": 1e-2, "sgd": 10.0}
LOW_RATE = 1e-7
EXPLODED = 2.0  # times the first step's loss


class Diverged(Exception):
    """An optimizer step came out non-finite; nothing was changed. `reason` completes "step N: ..."."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def diverged(step: int, reason: str, kept: str) -> FailedPrecondition:
    """The job's end; `kept` says what it leaves."""
    return FailedPrecondition(
        f"training diverged: step {step}: {reason}; lower the learning rate or look at the data ({kept})",
        code="training_diverged",
    )


def settings_warnings(spec: TrainingSpec) -> list[str]:
    """What a look at the settings says about learning rates that can't be meant."""
    rate = spec.learning_rate * max(1.0, spec.loraplus_lr_ratio)
    limit = HIGH_RATE[spec.optimizer]
    warnings = []
    if rate > limit:
        name = "learning_rate * loraplus_lr_ratio" if rate > spec.learning_rate else "learning_rate"
        warnings.append(
            f"{name} {rate:g} is very high: {spec.optimizer} seldom trains a LoRA adapter over {limit:g}; "
            "expect the loss to explode."
        )
    elif spec.learning_rate < LOW_RATE:
        warnings.append(f"learning_rate {spec.learning_rate:g} is so low that the adapter hardly changes.")
    if spec.optimizer != "sgd" and rate * spec.weight_decay >= 1:
        warnings.append(
            f"learning_rate * weight_decay is {rate * spec.weight_decay:g}: each step takes all of the "
            "weights away; lower weight_decay."
        )
    return warnings


class LossWatch:
    """Looks out for a loss that is finite and yet absurd: worse than guessing, and twice the first step's.

    `guess` is what guessing costs (`Objective.guess`): ln V a token, ln 2 a pair.
    """

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._first: float | None = None
        self._exploded = False

    def warning(self, step: int, loss: float) -> str | None:
        """What is to be said of the step's loss; once for each time that it explodes."""
        if self._first is None:
            self._first = loss
        before, self._exploded = self._exploded, loss > max(self._guess, EXPLODED * self._first)
        if not self._exploded or before:
            return None
        return (
            f"Step {step}: the loss is {loss:.4g}, it began with {self._first:.4g} and guessing "
            f"costs {self._guess:.4g}; the learning rate may be too high."
        )
