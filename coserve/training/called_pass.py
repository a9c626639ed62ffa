"""A pass of a model that is trained by calls: its data in microbatches, and what comes of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from coserve.training.batch_run import BatchRun
from coserve.training.microbatch import Aligned, Microbatch
from coserve.training.model_calls import CallResult, Datum, Pass
from coserve.training.pass_packing import PackedData, pack_data, places


class PassUnderWay:
    """A pass, its microbatches as numbers of its data, and what is known of them so far."""

    def __init__(self, call_id: int, call: Pass, longest_sharer: int) -> None:
        self.call_id, self.call = call_id, call
        self.is_wide = call.is_wide
        self.samples = [aligned(datum, self.is_wide) for datum in call.data]
        # dro pulls towards the sampler at every token, whatever its advantage: none is nobody's.
        alone = call.loss.name == "dro" or self.is_wide
        self.packed = pack_data(self.samples, 0 if alone else longest_sharer)
        self.begun = 0  # microbatches
        self.logprobs = [b""] * len(self.samples)
        self.losses: list[float] = []

    @property
    def largest(self) -> int:
        """Tokens of its largest microbatch."""
        return max(packed.tokens for packed in self.packed)

    def take(self, begun: list[PackedData], run: BatchRun) -> None:
        """Some of its microbatches are done."""
        self.losses += [part.loss for part in run.sums()]
        for packed, microbatch in zip(begun, run.microbatches.values(), strict=True):
            if self.is_wide:
                self._take_wide(packed, microbatch)
                continue
            logprobs_T = microbatch.logprobs_T.cpu().numpy().astype("<f4", copy=False)
            for number, at in zip(packed.numbers, places(packed, self.samples), strict=True):
                shared = logprobs_T[at.first : at.first + at.shared].tobytes()
                self.logprobs[number] = shared + logprobs_T[at.start : at.start + at.own].tobytes()

    def _take_wide(self, packed: PackedData, microbatch: Microbatch) -> None:
        logprobs_TK = microbatch.wide_logprobs_TK.cpu().numpy().astype("<f4", copy=False)
        for number, at in zip(packed.numbers, places(packed, self.samples), strict=True):
            width = self.call.data[number].width
            self.logprobs[number] = logprobs_TK[at.start : at.start + at.own, :width].tobytes()

    def sampled(self, packed: PackedData) -> np.ndarray | None:
        """The sampler's log-probabilities of a microbatch's targets, fp32 [T]; None where the loss reads
        none."""
        given = [self.call.data[number].sampled_logprobs for number in packed.numbers]
        if not any(given):
            return None
        q_T = np.empty(packed.tokens, dtype=np.float32)
        for values, at in zip(given, places(packed, self.samples), strict=True):
            q = np.frombuffer(values, dtype="<f4")
            q_T[at.first : at.first + at.shared] = q[: at.shared]
            q_T[at.start : at.start + at.own] = q[at.shared :]
        return q_T

    @property
    def result(self) -> CallResult:
        """Once all are done."""
        loss = math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else math.nan
        widths = [datum.width for datum in self.call.data] if self.is_wide else []
        return CallResult(logprobs=self.logprobs, widths=widths, metrics={"loss:sum": loss})


class Part(NamedTuple):
    """Microbatches of a pass that are under way."""

    owner: PassUnderWay
    packed: list[PackedData]
    run: BatchRun


def aligned(datum: Datum, wide: bool) -> Aligned:
    """A datum as a sample; `wide`: with its several targets a token, one though it may be."""
    tokens = np.frombuffer(datum.tokens, dtype="<i4").astype(np.int64)
    targets = np.frombuffer(datum.targets, dtype="<i4").astype(np.int64)
    weights = np.frombuffer(datum.coefficients, dtype="<f4").copy()
    if not wide:
        return Aligned(tokens, targets, weights)
    several = targets.reshape(-1, datum.width), weights.reshape(-1, datum.width)
    return Aligned(tokens, several[0][:, 0].copy(), several[1].sum(axis=1), several)
