"""The losses of a model that is trained by calls: sums over tokens, never means.

With logp the policy's log-probability of a token, q that of the policy which sampled it, A its advantage (or
weight) and r = exp(logp - q):

    cross_entropy        -sum A logp
    importance_sampling  -sum r A                                        (policy gradient, off-policy)
    ppo                  -sum min(r A, clip(r, low, high) A)             (Schulman et al. 2017)
    cispo                -sum sg(clip(r, low, high)) A logp              (MiniMax 2025)
    dro                  -sum (A logp - beta/2 (logp - q)^2)             (Richemond et al. 2024)

A microbatch carries A in `weights_T` and q in `reference_T`.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from coserve.training.microbatch import Microbatch
from coserve.training.model_calls import LossSettings
from coserve.training.objectives import CrossEntropy, LossSums, Objective, token_sums


class PolicyObjective(Objective):
    """A loss of one token that depends on its own logp, q and A only."""

    def count(self, microbatch: Microbatch) -> int:
        return microbatch.num_trained

    def weights(self, microbatch: Microbatch, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight_C = self.slope(
            microbatch.logprobs_T[rows], microbatch.reference_T[rows], microbatch.weights_T[rows]
        )
        return weight_C, torch.zeros_like(weight_C)

    def sums(self, microbatch: Microbatch) -> LossSums:
        rows = microbatch.trained_rows
        columns = (microbatch.logprobs_T, microbatch.reference_T, microbatch.weights_T)
        return token_sums(microbatch, self.losses(*(column_T[rows].double() for column_T in columns)))

    @abstractmethod
    def slope(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        """-dL/dlogp of each token."""

    @abstractmethod
    def losses(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        """Each token's loss."""


class ImportanceSampling(PolicyObjective):
    """-r A."""

    def slope(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return (logp_C - q_C).exp() * advantage_C

    def losses(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return -self.slope(logp_C, q_C, advantage_C)


class ClippedRatio(PolicyObjective):
    """A loss that bounds the ratio between `low` and `high`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def _clipped(self, logp_C: torch.Tensor, q_C: torch.Tensor) -> torch.Tensor:
        return (logp_C - q_C).exp().clamp(self.low, self.high)


class ProximalPolicy(ClippedRatio):
    """-min(r A, clip(r) A): no gradient where the clipped ratio is the smaller one."""

    def slope(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        plain_C = (logp_C - q_C).exp() * advantage_C
        clipped_C = self._clipped(logp_C, q_C) * advantage_C
        return torch.where(clipped_C < plain_C, torch.zeros_like(plain_C), plain_C)

    def losses(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        plain_C = (logp_C - q_C).exp() * advantage_C
        return -torch.minimum(plain_C, self._clipped(logp_C, q_C) * advantage_C)


class ClippedWeights(ClippedRatio):
    """CISPO: -sg(clip(r)) A logp; every token keeps a gradient."""

    def slope(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return self._clipped(logp_C, q_C) * advantage_C

    def losses(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return -self._clipped(logp_C, q_C) * advantage_C * logp_C


class DirectReward(PolicyObjective):
    """DRO: -(A logp - beta/2 (logp - q)^2)."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def slope(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return advantage_C - self.beta * (logp_C - q_C)

    def losses(self, logp_C: torch.Tensor, q_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        return -(advantage_C * logp_C - 0.5 * self.beta * (logp_C - q_C).square())


class SeveralTargets(CrossEntropy):
    """-sum_k A_k logp_k of each token: cross entropy with a distribution, say. The microbatch has wide
    targets and weights, and the sums of these in `weights_T`."""

    def sums(self, microbatch: Microbatch) -> LossSums:
        losses_TK = -microbatch.wide_weights_TK.double() * microbatch.wide_logprobs_TK.double()
        return token_sums(microbatch, losses_TK.flatten())


def called_objective(loss: LossSettings, *, wide: bool = False) -> Objective:
    """The objective of a pass; its name is one of `LOSSES`. `wide`: its data have several targets a token,
    which only cross entropy takes."""
    if loss.name == "cross_entropy":
        return SeveralTargets() if wide else CrossEntropy()
    if loss.name == "importance_sampling":
        return ImportanceSampling()
    if loss.name == "dro":
        return DirectReward(loss.beta)
    clipped = {"ppo": ProximalPolicy, "cispo": ClippedWeights}[loss.name]
    return clipped(loss.clip_low, loss.clip_high)
