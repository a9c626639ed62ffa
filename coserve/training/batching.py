"""Which examples make which optimizer step and microbatch: a pure function of data and settings. Torch-free.

An epoch is a sequence of units: examples, pairs of a preference data set, or packs (below). Its order is a
permutation of them drawn from (seed, epoch). An optimizer step takes the next `batch_size` units (fewer at an
epoch's end); its microbatches hold them as fully as a best fit does, a pair always whole. Examples that begin
alike go to one microbatch as far as they fit, and their prefix counts once (prefixes.py).

With `packing`, units are packs: the examples, in an order drawn once from the seed, fill one pack after the
other up to `max_length` tokens. A pack sets only how many examples a batch has: attention stays inside an
example, none is ever cut or reordered to fill a gap, and the packs are the same in every epoch, so that all
epochs have as many steps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from coserve.errors import InvalidRequest
from coserve.training.job import TrainingSpec
from coserve.training.prefixes import LEAST, SharedRun, groups, unit_prefix

MICROBATCH_TOKENS = 1024


class ExampleLengths(Protocol):
    """What is asked of a data set (training/dataset.py)."""

    @property
    def pairs(self) -> bool: ...
    @property
    def lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...
    def trained_tokens(self, index: int) -> int: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: `microbatches` of example numbers, `trained_tokens` and `tokens` over all of them,
    and the `epoch` reached when it is done (1.5: half of the second). `shared` says of each microbatch which
    of its examples share a prefix; `shared_tokens` of all the tokens are computed with another example's."""

    step: int
    epoch: float
    microbatches: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[SharedRun, ...], ...]
    trained_tokens: int
    tokens: int

    @property
    def examples(self) -> tuple[int, ...]:
        """All example numbers, microbatch by microbatch."""
        return tuple(i for microbatch in self.microbatches for i in microbatch)

    @property
    def shared_tokens(self) -> int:
        """Tokens that stand in a prefix which another example brought along."""
        return sum((run.examples - 1) * run.tokens for runs in self.shared for run in runs)


class Bundle(NamedTuple):
    """Units that stand together: the tokens of the `prefix` that all their examples read (0: one unit, and
    nothing shared), and of all, the prefix counted once."""

    units: tuple[int, ...]
    prefix: int
    tokens: int


def epoch_order(num_units: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Unit numbers in the order of epoch `epoch` (from 0), int64."""
    if not shuffle:
        return np.arange(num_units)
    return permutation(num_units, [seed, epoch])


def permutation(length: int, seed: Sequence[int]) -> np.ndarray:
    """0 to `length` - 1 in an order drawn from `seed`, int64."""
    # Random bits above, the number itself below: one sort, no ties, and fast enough for a step to wait for.
    low = np.uint64((1 << length.bit_length()) - 1)
    keys = np.random.Philox(seed=list(seed)).random_raw(length) & ~low | np.arange(length, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices into `lengths` in runs of at most `limit` tokens (a longer one stands alone).

    Best fit, longest first: each goes where it leaves the least room, so no two runs would fit into one. A
    run's indices ascend, and the runs are in the order of their first.
    """
    runs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, run), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            room, run = limit, len(runs)
            runs.append([])
        else:
            room, run = rooms.pop(place)
        runs[run].append(index)
        insort(rooms, (room - lengths[index], run))
    return sorted(sorted(run) for run in runs)


def fill(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Where packs begin that hold `lengths` in order, each up to `limit` tokens (a longer one stands alone),
    and the end of the last: int64 [packs + 1]."""
    ends = np.cumsum(lengths)
    reach = np.searchsorted(ends, ends - lengths + limit, side="right")  # where a pack that begins here ends
    starts = [0]
    while starts[-1] < len(lengths):
        begin = starts[-1]
        starts.append(max(begin + 1, int(reach[begin])))
    return np.asarray(starts)


class BatchPlan:
    """Every optimizer step of a job; an epoch has `num_units` units.

    Raises InvalidRequest for an empty data set and for packs of pairs, and in `step` for an example without a
    trained token or of more than `max_length` tokens (the model's context; 0: no limit). Examples of up to
    `longest_sharer` tokens share prefixes (prefixes.py).
    """

    def __init__(
        self,
        dataset: ExampleLengths,
        spec: TrainingSpec,
        seed: int,
        *,
        microbatch_tokens: int = MICROBATCH_TOKENS,
        max_length: int = 0,
        longest_sharer: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise InvalidRequest("the training file holds no example", param="training_file")
        self._dataset = dataset
        self._spec = spec
        self._seed = seed
        self._limit = microbatch_tokens
        self._max_length = max_length
        self._longest_sharer = longest_sharer
        self._group = 2 if dataset.pairs else 1  # examples that stay together
        self._lengths = np.asarray(dataset.lengths)
        self._packs: tuple[np.ndarray, np.ndarray] | None = None
        if spec.packing:
            self._packs = self._make_packs(spec.max_length or max_length)
        units = len(self._packs[1]) - 1 if self._packs else len(dataset) // self._group
        self.num_units = units
        self.steps_per_epoch = -(-units // spec.batch_size)
        self.total_steps = spec.max_steps or self.steps_per_epoch * spec.n_epochs
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the examples' lengths, order and packs."""
        packs = sum(array.nbytes for array in self._packs or ())
        return self._lengths.nbytes + self._order[1].nbytes + packs

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example, or pair, whose prefix counts once where it is shared: no microbatch
        that holds it has fewer, and none has more if that is more than microbatches have anyway."""
        whole = len(self._lengths) // self._group * self._group
        sizes = self._lengths[:whole].reshape(-1, self._group).sum(axis=1)
        if self._group == 1 or not self._longest_sharer:
            return int(sizes.max())
        longest = 0
        for unit in np.argsort(-sizes, kind="stable").tolist():
            if sizes[unit] <= longest:
                break
            (bundle,) = self._bundles([self._examples(unit)], [int(sizes[unit])], 0)
            longest = max(longest, bundle.tokens)
        return longest

    def step(self, step: int) -> StepBatch:
        """Optimizer step `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = epoch_order(self.num_units, self._seed, epoch, self._spec.shuffle)
            self._order = (epoch, order)
        size = self._spec.batch_size
        units = self._order[1][place * size : (place + 1) * size]
        chosen = [int(i) for unit in units for i in self._examples(int(unit))]
        lengths = [int(self._lengths[i]) for i in chosen]
        trained = [self._dataset.trained_tokens(i) for i in chosen]
        self._check(chosen, lengths, trained)
        group = self._group
        together = [chosen[i : i + group] for i in range(0, len(chosen), group)]
        sizes = [sum(lengths[i : i + group]) for i in range(0, len(lengths), group)]
        bundles = self._bundles(together, sizes, self._limit)
        runs = [[bundles[i] for i in run] for run in pack([b.tokens for b in bundles], self._limit)]
        return StepBatch(
            step=step,
            epoch=step / self.steps_per_epoch,
            microbatches=tuple(
                tuple(i for bundle in run for unit in bundle.units for i in together[unit]) for run in runs
            ),
            shared=tuple(tuple(SharedRun(len(b.units) * group, b.prefix) for b in run) for run in runs),
            trained_tokens=sum(trained),
            tokens=sum(lengths),
        )

    def _bundles(self, units: Sequence[Sequence[int]], sizes: Sequence[int], limit: int) -> list[Bundle]:
        """Units of examples, of so many tokens each, by the prefixes they share, in the order of their first.

        A bundle that shares has at most `limit` tokens; or half of that beside its prefix, if the data's
        longest example has as many.
        """
        alone: list[Bundle] = []
        prefixes: dict[int, np.ndarray] = {}
        for unit, examples in enumerate(units):
            if max(self._lengths[i] for i in examples) > self._longest_sharer:
                alone.append(Bundle((unit,), 0, sizes[unit]))
            else:
                prefixes[unit] = unit_prefix(self._dataset, examples)
        found = []
        for group, prefix in groups(prefixes, self._group):
            own = [sizes[unit] - prefix * self._group for unit in group]
            room = limit and max(limit, min(prefix + limit // 2, self.longest)) - prefix
            for run in pack(own, room):
                members = tuple(group[i] for i in run)
                if len(members) > 1:
                    found.append(Bundle(members, prefix, prefix + sum(own[i] for i in run)))
                else:
                    found.append(self._alone(members[0], sizes[members[0]], prefixes[members[0]]))
        return sorted(alone + found)

    def _alone(self, unit: int, size: int, prefix: np.ndarray) -> Bundle:
        """A pair reads its prompt once, an example shares with nobody."""
        shared = len(prefix) if self._group > 1 and len(prefix) >= LEAST else 0
        return Bundle((unit,), shared, size - shared)

    def _make_packs(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(examples in the order of the packs, where each pack begins)."""
        if self._group > 1:
            raise InvalidRequest("preferences aren't packed; leave packing out", param="training.packing")
        if limit <= 0:
            raise InvalidRequest("packing needs a max_length", param="training.max_length")
        members = np.arange(len(self._lengths))
        if self._spec.shuffle:
            members = permutation(len(self._lengths), [self._seed, 0, 1])  # a stream of its own
        return members, fill(self._lengths[members], limit)

    def _examples(self, unit: int) -> Sequence[int]:
        if self._packs is None:
            return range(unit * self._group, (unit + 1) * self._group)
        members, starts = self._packs
        return members[starts[unit] : starts[unit + 1]].tolist()

    def _check(self, chosen: Sequence[int], lengths: Sequence[int], trained: Sequence[int]) -> None:
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
