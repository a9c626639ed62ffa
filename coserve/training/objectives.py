"""What a job minimises. Every objective is a function of the trained tokens' log-probabilities under the
adapter in training and, where it needs one, under the reference; so its gradient is one signed weight a
token, -dL/dlogp, and one share for the whole vocabulary (kernels/cross_entropy.py).

A token's own weight w is 1 unless its sample says otherwise; sums are over trained tokens and are divided by
`count` over the whole optimizer step. docs/numerics.md states the formulas with their sources.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from coserve.training.job import TrainingSpec
from coserve.training.methods import check_method, needs_reference
from coserve.training.microbatch import Microbatch

CHUNK = 256  # most trained tokens of a pair whose halves needn't be scored ahead
ROWS = 16  # trained tokens of a unit: the fewest whose arithmetic outweighs reading the head


@dataclass(frozen=True)
class Chunk:
    """Trained tokens [start, end) of a microbatch, counted among the trained ones. `ahead`: their gradient
    depends on tokens outside, so they are scored before the first loss chunk."""

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

    def guess(self, vocab_size: int) -> float:
        """The loss of a model that knows nothing; a good deal more than that is absurd."""
        return math.log(vocab_size)

    def chunks(self, microbatch: Microbatch, rows: int) -> tuple[Chunk, ...]:
        """The trained tokens in order, cut at multiples of `rows` as far as the objective allows it."""
        return split(0, microbatch.num_trained, rows)


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


class DynamicFineTuning(Objective):
    """-w sg(p) logp: each token's gradient is scaled by its probability (Wu et al. 2025)."""

    def count(self, microbatch: Microbatch) -> int:
        return microbatch.num_trained

    def guess(self, vocab_size: int) -> float:
        """The most that a token can cost: -p log p at p = 1/e."""
        return 1.0 / math.e

    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_C = microbatch.weights_T[rows] * microbatch.logprobs_T[rows].exp()
        return weight_C, torch.zeros_like(weight_C)

    def sums(self, microbatch: Microbatch) -> LossSums:
        rows = microbatch.trained_rows
        logprobs_C = microbatch.logprobs_T[rows].double()
        return token_sums(microbatch, -microbatch.weights_T[rows] * logprobs_C.exp() * logprobs_C)


class WithKL(Objective):
    """`inner` plus `coefficient` times exp(d) - d - 1, d = reference logp - logp, over the trained tokens: an
    estimate of the divergence from the reference that is never negative (Schulman 2020, "k3"). A token's own
    weight plays no part in it."""

    needs_reference = True

    def __init__(self, inner: Objective, coefficient: float) -> None:
        self.inner = inner
        self.coefficient = coefficient

    def count(self, microbatch: Microbatch) -> int:
        return self.inner.count(microbatch)

    def guess(self, vocab_size: int) -> float:
        """That of `inner`."""
        return self.inner.guess(vocab_size)

    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_C, uniform_C = self.inner.weights(microbatch, rows)
        distance_C = microbatch.reference_T[rows] - microbatch.logprobs_T[rows]
        return weight_C + self.coefficient * distance_C.expm1(), uniform_C

    def sums(self, microbatch: Microbatch) -> LossSums:
        found, rows = self.inner.sums(microbatch), microbatch.trained_rows
        distance_C = (microbatch.reference_T[rows] - microbatch.logprobs_T[rows]).double()
        divergence = exact_sum(distance_C.expm1() - distance_C)
        return LossSums(found.loss + self.coefficient * divergence, found.count, found.correct)


class DirectPreference(Objective):
    """DPO (Rafailov et al. 2023, the sigmoid loss), over samples 2i and 2i + 1, the chosen and the rejected:

        -log sigmoid(beta margin),   margin = sum over chosen - sum over rejected of w (logp - reference logp)

    A token's weight is +- beta sigmoid(-beta margin) w. The margin must be known before the gradient of the
    pair's first token, so a chunk holds whole pairs; the tokens of a pair too long for one are scored ahead.
    """

    needs_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def count(self, microbatch: Microbatch) -> int:
        return len(microbatch.trained_starts) // 2

    def guess(self, vocab_size: int) -> float:
        """ln 2: neither answer is preferred."""
        return math.log(2.0)

    def chunks(self, microbatch: Microbatch, rows: int) -> tuple[Chunk, ...]:
        bounds = microbatch.trained_starts[::2].tolist()
        chunks: list[Chunk] = []
        start = 0
        for begin, end in pairwise(bounds):
            if end - start > rows and start < begin:
                chunks.append(Chunk(start, begin))
                start = begin
            if end - begin > CHUNK:
                chunks += split(begin, end, rows, ahead=True)
                start = end
        return (*chunks, Chunk(start, bounds[-1])) if start < bounds[-1] else tuple(chunks)

    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slopes_P = self.beta * torch.sigmoid(-self.beta * self._margins(microbatch))
        signed_S = torch.stack([slopes_P, -slopes_P], dim=1).flatten()
        lengths_S = torch.from_numpy(np.diff(microbatch.trained_starts))
        signed_T = torch.zeros_like(microbatch.weights_T)
        signed_T[microbatch.trained_rows] = signed_S.repeat_interleave(lengths_S).to(signed_T)
        return microbatch.weights_T[rows] * signed_T[rows], torch.zeros_like(signed_T[rows])

    def sums(self, microbatch: Microbatch) -> LossSums:
        margins_P = self._margins(microbatch)
        losses_P = -logsigmoid(self.beta * margins_P)
        return LossSums(exact_sum(losses_P), len(margins_P), int((margins_P > 0).sum()))

    def _margins(self, microbatch: Microbatch) -> torch.Tensor:
        """float64 [pairs] on the CPU; sums over an answer are exactly rounded."""
        rows = microbatch.trained_rows
        gain_C = microbatch.logprobs_T[rows].double() - microbatch.reference_T[rows].double()
        gain_C = (gain_C * microbatch.weights_T[rows]).cpu()
        starts = microbatch.trained_starts.tolist()
        sums_S = torch.tensor([exact_sum(gain_C[a:b]) for a, b in pairwise(starts)], dtype=torch.float64)
        return sums_S[::2] - sums_S[1::2]


def make_objective(method: str, training: TrainingSpec) -> Objective:
    """What a job of this method minimises. InvalidRequest as `check_method` raises it."""
    check_method(method, training)
    if method == "dpo":
        return DirectPreference(training.beta)
    inner = DynamicFineTuning() if method == "dft" else CrossEntropy(training.label_smoothing)
    return WithKL(inner, training.kl_coef) if needs_reference(method, training) else inner


def token_sums(microbatch: Microbatch, losses_C: torch.Tensor) -> LossSums:
    """From the trained tokens' losses, in their order."""
    correct = int(microbatch.greedy_T[microbatch.trained_rows].sum())
    return LossSums(exact_sum(losses_C), microbatch.num_trained, correct)


def exact_sum(values_N: torch.Tensor) -> float:
    """The sum, exactly rounded; NaN where a value isn't finite."""
    return math.fsum(values_N.tolist()) if bool(values_N.isfinite().all()) else math.nan


def split(start: int, end: int, rows: int, ahead: bool = False) -> tuple[Chunk, ...]:
    """[start, end) cut at multiples of `rows`."""
    cuts = [start, *range((start // rows + 1) * rows, end, rows), end]
    return tuple(Chunk(a, b, ahead) for a, b in pairwise(cuts) if a < b)
