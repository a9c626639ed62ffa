"""Which data of a pass stand in which microbatch, and which of them begin alike there.

A group of answers to one prompt reads it once: a shared prefix is computed for all of them, forward and
backward (prefixes.py). Its tokens are scored too, but must count in nobody's loss, and be followed by the
same ones in all. Like everything else about microbatches it follows from the data alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from coserve.training.batching import MICROBATCH_TOKENS, pack
from coserve.training.microbatch import Aligned
from coserve.training.prefixes import SharedRun, groups


class PackedData(NamedTuple):
    """One microbatch: numbers of data in its order, those that share, and its tokens."""

    numbers: tuple[int, ...]
    shared: tuple[SharedRun, ...]
    tokens: int


class Place(NamedTuple):
    """Rows of a microbatch that one of its data reads: `shared` ones from `first` on, then its `own`."""

    first: int
    shared: int
    start: int
    own: int


def pack_data(samples: Sequence[Aligned], longest_sharer: int) -> list[PackedData]:
    """Data in microbatches of about `MICROBATCH_TOKENS`, each whole. Those of up to `longest_sharer` tokens
    may share; 0: none do."""
    lengths = [len(sample.token_ids) for sample in samples]
    bundles: list[tuple[tuple[int, ...], int, int]] = []
    may = {n: _shareable(sample) for n, sample in enumerate(samples) if lengths[n] <= longest_sharer}
    bundles += [((n,), 0, lengths[n]) for n in range(len(samples)) if n not in may]
    for members, common in groups(may, 1):
        prefix = max(0, common - 1)  # what follows the last of them is the first that differs
        own = [lengths[n] - prefix for n in members]
        room = max(MICROBATCH_TOKENS, min(prefix + MICROBATCH_TOKENS // 2, max(lengths))) - prefix
        for run in pack(own, room):
            together = tuple(members[i] for i in run)
            if len(together) > 1:
                bundles.append((together, prefix, prefix + sum(own[i] for i in run)))
            else:
                bundles.append((together, 0, lengths[together[0]]))
    bundles.sort()
    packed = []
    for run in pack([tokens for _, _, tokens in bundles], MICROBATCH_TOKENS):
        chosen = [bundles[i] for i in run]
        packed.append(
            PackedData(
                tuple(n for numbers, _, _ in chosen for n in numbers),
                tuple(SharedRun(len(numbers), prefix) for numbers, prefix, _ in chosen),
                sum(tokens for _, _, tokens in chosen),
            )
        )
    return packed


def places(packed: PackedData, samples: Sequence[Aligned]) -> Iterator[Place]:
    """Where each of a microbatch's data stands, in order."""
    numbers, end = iter(packed.numbers), 0
    for run in packed.shared:
        first, end = end, end + run.tokens
        for _ in range(run.examples):
            own = len(samples[next(numbers)].token_ids) - run.tokens
            yield Place(first, run.tokens, end, own)
            end += own


def _shareable(sample: Aligned) -> np.ndarray:
    """The tokens that others may begin with too: one more than those whose targets count nothing and are the
    tokens after them."""
    counts = np.flatnonzero(sample.weights)
    breaks = np.flatnonzero(sample.targets[:-1] != sample.token_ids[1:])
    ends = [len(sample.token_ids) - 1, *counts[:1], *breaks[:1]]
    return sample.token_ids[: int(min(ends)) + 1]
