"""A share held out: drawn from the seed, disjoint, complete, pairs whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.errors import InvalidRequest
from coserve.training.data_split import split
from coserve.training.dataset import TokenDataset


def halves(folder: Path, examples: int, share: float, seed: int, pairs: bool = False) -> list[list[int]]:
    """First tokens of the examples (which are numbered) of the training and of the validation part."""
    TokenDataset.write(folder / "whole", (([i, 9], [-100, 9]) for i in range(examples)), pairs=pairs)
    whole = TokenDataset.open(folder / "whole")
    count = split(whole, share, seed, folder / "train", folder / "validation")
    parts = [TokenDataset.open(folder / name) for name in ("train", "validation")]
    assert [part.pairs for part in parts] == [pairs] * 2
    assert len(parts[1]) == count * (2 if pairs else 1)
    assert all(part[i][1].tolist() == [-100, 9] for part in parts for i in range(len(part)))
    return [[int(part[i][0][0]) for i in range(len(part))] for part in parts]


@given(st.integers(2, 30), st.floats(0.001, 0.999), st.integers(0, 5), st.booleans())
def test_parts_are_disjoint_complete_and_in_order(tmp_path_factory, units, share, seed, pairs) -> None:
    examples = units * (2 if pairs else 1)
    train, validation = halves(tmp_path_factory.mktemp("split"), examples, share, seed, pairs)
    assert sorted(train + validation) == list(range(examples)) and train and validation
    assert train == sorted(train) and validation == sorted(validation)
    if pairs:
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(train[::2], train[1::2], strict=True))


def test_the_share_is_counted_exactly_and_drawn_from_the_seed(tmp_path: Path) -> None:
    found = [halves(tmp_path / str(n), 200, 0.1, seed)[1] for n, seed in enumerate((3, 3, 4))]
    assert [len(part) for part in found] == [20] * 3
    assert found[0] == found[1] != found[2]


def test_one_example_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="one example only") as caught:
        halves(tmp_path, 1, 0.5, 0)
    assert caught.value.param == "training.validation_split"
