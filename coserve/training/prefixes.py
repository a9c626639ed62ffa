"""Which examples of an optimizer step begin alike, so that what they share is computed once. Torch-free.

A shared prefix stands once in its microbatch's stream, before the examples that read it (hydragen's idea,
Juravsky et al. 2024, for training). None of its tokens has a target, so an example shares at most what lies
before the row of its first trained token; and each example reads one prefix only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from coserve.models.config import ModelConfig
from coserve.training.dataset import NOT_TRAINED

LEAST = 16  # tokens: less isn't worth the scattered keys
MOST_UNITS = 64  # that share one prefix: bounds the search; a microbatch seldom holds more


class Examples(Protocol):
    """What is asked of a data set (training/dataset.py)."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


class SharedRun(NamedTuple):
    """The next `examples` of a microbatch begin with the same `tokens` tokens, which stand once."""

    examples: int
    tokens: int


def longest_sharer(config: ModelConfig, dropout: float) -> int:
    """Tokens that an example may have to share a prefix, 0 where none may: dropout draws another mask for
    each, and a sliding window that is shorter than the example would move on over what lies in between."""
    if dropout > 0:
        return 0
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return min([config.max_position_embeddings, *(window for window in windows if window)])


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(a), len(b))
    differ = a[:shorter] != b[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def shareable(example: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The tokens of an example before the row that has its first trained token as target."""
    token_ids, labels = example
    trained = labels[1:] != NOT_TRAINED
    return token_ids[: int(trained.argmax()) if trained.any() else len(trained)]


def unit_prefix(dataset: Examples, unit: Sequence[int]) -> np.ndarray:
    """What all examples of a unit begin with and may share."""
    heads = [shareable(dataset[i]) for i in unit]
    length = min([len(heads[0]), *(common_length(heads[0], head) for head in heads[1:])])
    return heads[0][:length]


def groups(prefixes: dict[int, np.ndarray], examples: int) -> list[tuple[list[int], int]]:
    """(units, tokens they share) of units that may share such `prefixes` and have so many `examples` each:
    the best cut of them, in the order of their tokens, into stretches of at most `MOST_UNITS`.

    In that order units that begin alike are neighbours, and what several share is the least that two
    neighbours do. The best cut follows from those of fewer units."""
    order = sorted(prefixes, key=lambda unit: (prefixes[unit].astype(">u4").tobytes(), unit))
    reach = [len(prefixes[unit]) for unit in order]
    links = [common_length(prefixes[a], prefixes[b]) for a, b in pairwise(order)]
    saved, begins = [0], [0]  # of the first n units: the most tokens saved, and where their last group begins
    for end in range(1, len(order) + 1):
        shared, best, begin_of_best = reach[end - 1], -1, end - 1
        for begin in range(end - 1, max(-1, end - 1 - MOST_UNITS), -1):
            if begin < end - 1:
                shared = min(shared, links[begin])
                if shared < LEAST:
                    break
            gain = saved[begin] + ((end - begin) * examples - 1) * (shared if shared >= LEAST else 0)
            if gain > best:
                best, begin_of_best = gain, begin
        saved.append(best)
        begins.append(begin_of_best)
    found, end = [], len(order)
    while end:
        begin = begins[end]
        shared = min([reach[begin], *links[begin : end - 1]])
        found.append((sorted(order[begin:end]), shared if shared >= LEAST else 0))
        end = begin
    return found
