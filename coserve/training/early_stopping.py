"""What the losses on the validation set decide: which step is the best, and when training has gone on enough.
Torch-free."""

from __future__ import annotations

import math

import msgspec


class EvaluationState(msgspec.Struct, frozen=True):
    """What the next evaluation and the job's end depend on; kept in checkpoints.

    `evaluated` is the last step that was scored, `best_step` (0: none yet) the one with the smallest loss,
    `misses` the evaluations in a row that didn't improve on it enough.
    """

    evaluated: int = 0
    best_step: int = 0
    best_loss: float | None = None
    misses: int = 0
    stopped: bool = False

    def after(self, step: int, loss: float, patience: int, threshold: float) -> EvaluationState:
        """With the loss of one more evaluation, by the rule of transformers' EarlyStoppingCallback: an
        improvement by no more than `threshold` is a miss, and yet the new best. A loss that isn't finite is
        no improvement. `patience` 0 never stops."""
        best = math.inf if self.best_loss is None else self.best_loss
        better = loss < best
        misses = 0 if better and (self.best_loss is None or best - loss > threshold) else self.misses + 1
        return EvaluationState(
            evaluated=step,
            best_step=step if better else self.best_step,
            best_loss=loss if better else self.best_loss,
            misses=misses,
            stopped=0 < patience <= misses,
        )
