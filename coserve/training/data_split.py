"""A share of a data set held out for validation. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coserve.errors import InvalidRequest
from coserve.training.batching import permutation
from coserve.training.dataset import TokenDataset


def split(whole: TokenDataset, share: float, seed: int, train: Path, validation: Path) -> int:
    """Write `whole` as two data sets that share no example, each in its order; how many are held out.

    Which ones is drawn from the seed alone; pairs stay together and count as one. At least one example goes
    to either side; InvalidRequest when there aren't two.
    """
    group = 2 if whole.pairs else 1
    units = len(whole) // group
    if units < 2:
        raise InvalidRequest(
            "there is one example only, none can be held out for validation; set validation_split to 0",
            param="training.validation_split",
        )
    count = min(units - 1, max(1, round(units * share)))
    held_out = np.zeros(units, dtype=bool)
    held_out[permutation(units, [seed, 0, 2])[:count]] = True  # a stream of its own
    for target, chosen in ((validation, held_out), (train, ~held_out)):
        TokenDataset.write(target, _examples(whole, np.flatnonzero(chosen), group), pairs=whole.pairs)
    return count


def _examples(whole: TokenDataset, units: np.ndarray, group: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for unit in units:
        for place in range(group):
            yield whole[int(unit) * group + place]
