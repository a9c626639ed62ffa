"""What a job minimises. Every objective is a function of the trained tokens' log-probabilities under the
policy (the adapter in training) and, where it needs one, under the reference; so its gradient is one signed
weight a token, -dL/dlogp, and one share for the whole vocabulary (kernels/cross_entropy.py).

A token's own weight w is 1 unless its sample says otherwise; sums are over trained tokens and are divided by
`count` over the whole optimizer step. docs/numerics.md states the formulas with their sources.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from coserve.training.microbatch import Microbatch

CHUNK = 256  # trained tokens of one unit: the head is read from memory once for them all


@dataclass(frozen=True)
class Chunk:
    """Trained tokens [start, end) of a microbatch, counted among the trained ones. `ahead`: their gradient
    depends on tokens outside, so the policy scores them before the first loss chunk."""

    start: int
    end: int
    ahead: bool = False


@dataclass(frozen=True)
class LossSums:
    """Sum of losses, what it is divided by, and how many of these were right (see `Objective.sums`)."""

    loss: float
    count: int
    correct: int

    @classmethod
    def total(cls, parts: Iterable[LossSums]) -> LossSums:
        """Of several microbatches."""
        parts = list(parts)
        loss = math.fsum(part.loss for part in parts)
        return cls(loss, sum(part.count for part in parts), sum(part.correct for part in parts))


class Objective(ABC):
    """Reads a microbatch's log-probabilities; holds settings only."""

    needs_reference = False

    @abstractmethod
    def count(self, microbatch: Microbatch) -> int:
        """Terms of the mean: trained tokens, or pairs."""

    @abstractmethod
    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, uniform) fp32 [C] of the tokens `rows`, before the division by the count. Their chunk, and
        all that `chunks` wants scored ahead, has log-probabilities now."""

    @abstractmethod
    def sums(self, microbatch: Microbatch) -> LossSums:
        """Of a microbatch whose tokens are all scored, exactly rounded so that no order matters. `correct`
        counts the tokens that greedy decoding would have chosen, or the pairs with a positive margin."""

    def chunks(self, microbatch: Microbatch) -> tuple[Chunk, ...]:
        """The units of the head, at most `CHUNK` trained tokens each, in order."""
        return split(0, microbatch.num_trained)


class CrossEntropy(Objective):
    """w [(1 - eps) (-logp) + eps mean_v(-log p_v)], eps = `label_smoothing` (Szegedy et al. 2016)."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def count(self, microbatch: Microbatch) -> int:
        return microbatch.num_trained

    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_C = microbatch.weights_T[rows]
        return weight_C * (1.0 - self.label_smoothing), weight_C * self.label_smoothing

    def sums(self, microbatch: Microbatch) -> LossSums:
        rows = microbatch.trained_rows
        losses_C = -microbatch.logprobs_T[rows].double()
        if self.label_smoothing:
            mean_C = -microbatch.mean_logprobs_T[rows].double()
            losses_C = (1.0 - self.label_smoothing) * losses_C + self.label_smoothing * mean_C
        return token_sums(microbatch, losses_C * microbatch.weights_T[rows])


def token_sums(microbatch: Microbatch, losses_C: torch.Tensor) -> LossSums:
    """From the trained tokens' losses, in their order."""
    correct = int(microbatch.greedy_T[microbatch.trained_rows].sum())
    return LossSums(exact_sum(losses_C), microbatch.num_trained, correct)


def exact_sum(values_N: torch.Tensor) -> float:
    """The sum, exactly rounded; NaN where a value isn't finite."""
    return math.fsum(values_N.tolist()) if bool(values_N.isfinite().all()) else math.nan


def split(start: int, end: int, ahead: bool = False) -> tuple[Chunk, ...]:
    """[start, end) in chunks."""
    return tuple(Chunk(first, min(first + CHUNK, end), ahead) for first in range(start, end, CHUNK))
