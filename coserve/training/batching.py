"""Which examples make which optimizer step and microbatch: a pure function of data and settings. Torch-free.

An epoch's order is a permutation drawn from (seed, epoch). An optimizer step takes the next `batch_size`
examples of it (fewer at an epoch's end); its microbatches pack them greedily in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from coserve.errors import InvalidRequest
from coserve.training.job import TrainingSpec

MICROBATCH_TOKENS = 1024


class ExampleLengths(Protocol):
    """What is asked of a data set (training/dataset.py)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...
    def trained_tokens(self, index: int) -> int: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: `microbatches` of example numbers, `trained_tokens` and `tokens` over all of them,
    and the `epoch` reached when it is done (1.5: half of the second)."""

    step: int
    epoch: float
    microbatches: tuple[tuple[int, ...], ...]
    trained_tokens: int
    tokens: int

    @property
    def examples(self) -> tuple[int, ...]:
        """All example numbers in order."""
        return tuple(i for microbatch in self.microbatches for i in microbatch)


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Example numbers in the order of epoch `epoch` (from 0)."""
    if not shuffle:
        return list(range(num_examples))
    keys = np.random.Generator(np.random.Philox(seed=[seed, epoch])).random(num_examples)
    return [int(i) for i in np.argsort(keys, kind="stable")]


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices into `lengths`, in order, in runs of at most `limit` tokens (a longer one stands alone)."""
    runs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not runs or length > room:
            runs.append([])
            room = limit
        runs[-1].append(index)
        room -= length
    return runs


class BatchPlan:
    """Every optimizer step of a job.

    Raises InvalidRequest for an empty data set, and in `step` for an example without a trained token or of
    more than `max_length` tokens (the model's context; 0: no limit).
    """

    def __init__(
        self,
        dataset: ExampleLengths,
        spec: TrainingSpec,
        seed: int,
        *,
        microbatch_tokens: int = MICROBATCH_TOKENS,
        max_length: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise InvalidRequest("the training file holds no example", param="training_file")
        self._dataset = dataset
        self._spec = spec
        self._seed = seed
        self._limit = microbatch_tokens
        self._max_length = max_length
        self.steps_per_epoch = -(-len(dataset) // spec.batch_size)
        self.total_steps = spec.max_steps or self.steps_per_epoch * spec.n_epochs
        self._order: tuple[int, list[int]] = (-1, [])

    def step(self, step: int) -> StepBatch:
        """Optimizer step `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(len(self._dataset), self._seed, epoch, self._spec.shuffle)
            self._order = (epoch, order)
        size = self._spec.batch_size
        chosen = self._order[1][place * size : (place + 1) * size]
        lengths = [len(self._dataset[i][0]) for i in chosen]
        trained = [self._dataset.trained_tokens(i) for i in chosen]
        if 0 in trained:
            raise InvalidRequest(
                f"example {chosen[trained.index(0)]} of the training data has no trained token",
                param="training_file",
            )
        longest = max(lengths)
        if 0 < self._max_length < longest:
            raise InvalidRequest(
                f"example {chosen[lengths.index(longest)]} of the training data has {longest} tokens, "
                f"the model takes {self._max_length}; set max_length",
                param="training_file",
            )
        runs = pack(lengths, self._limit)
        return StepBatch(
            step=step,
            epoch=step / self.steps_per_epoch,
            microbatches=tuple(tuple(chosen[i] for i in run) for run in runs),
            trained_tokens=sum(trained),
            tokens=sum(lengths),
        )
