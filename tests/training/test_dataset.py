import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.errors import ConfigError, Conflict, InvalidRequest
from coserve.training.dataset import TokenDataset, count_trained

EXAMPLES = [([5, 6, 7], [-100, 6, 7]), ([1], [1]), ([9, 8, 7, 6], [9, -100, 7, -100])]


def test_examples_come_back_as_written(tmp_path):
    assert TokenDataset.write(tmp_path / "data", iter(EXAMPLES)) == 3
    dataset = TokenDataset.open(tmp_path / "data")
    assert len(dataset) == 3
    assert [(t.tolist(), lab.tolist()) for t, lab in (dataset[i] for i in range(3))] == EXAMPLES
    assert dataset.lengths.tolist() == [3, 1, 4]
    assert isinstance(dataset.tokens, np.memmap) and dataset.tokens.dtype == np.int32
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_first_token_is_never_a_target(tmp_path):
    TokenDataset.write(tmp_path / "data", EXAMPLES)
    dataset = TokenDataset.open(tmp_path / "data")
    assert [dataset.trained_tokens(i) for i in range(3)] == [2, 0, 1]
    assert count_trained([4, -100, 4]) == 1 and count_trained([]) == 0


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_any_examples_survive(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any") / "data"
    TokenDataset.write(folder, ((row, row) for row in rows))
    dataset = TokenDataset.open(folder)
    assert [dataset[i][0].tolist() for i in range(len(dataset))] == rows


def test_writing_is_all_or_nothing(tmp_path):
    def broken():
        yield EXAMPLES[0]
        raise InvalidRequest("line 2 is bad")

    with pytest.raises(InvalidRequest, match="line 2"):
        TokenDataset.write(tmp_path / "data", broken())
    with pytest.raises(InvalidRequest, match="no example"):
        TokenDataset.write(tmp_path / "data", [])
    with pytest.raises(InvalidRequest, match="2 tokens and 1 labels"):
        TokenDataset.write(tmp_path / "data", [([1, 2], [1])])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.tmp").mkdir()
    TokenDataset.write(tmp_path / "data", EXAMPLES)
    with pytest.raises(Conflict, match="exists already"):
        TokenDataset.write(tmp_path / "data", EXAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_pairs_are_remembered(tmp_path):
    TokenDataset.write(tmp_path / "pairs", EXAMPLES[:2], pairs=True)
    assert TokenDataset.open(tmp_path / "pairs").pairs
    with pytest.raises(InvalidRequest, match="3 examples make no pairs"):
        TokenDataset.write(tmp_path / "odd", EXAMPLES, pairs=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.parametrize("text", [None, b"", b"[]", b"{}", b'{"pairs": 1}', b'{"pairs": true}'])
def test_damaged_meta_is_refused(tmp_path, text):
    TokenDataset.write(tmp_path / "data", EXAMPLES)
    meta = tmp_path / "data" / "meta.json"
    meta.unlink()
    if text is not None:
        meta.write_bytes(text)
    with pytest.raises(ConfigError, match="data set 'data'"):
        TokenDataset.open(tmp_path / "data")


@pytest.mark.parametrize("name", ["tokens", "labels", "offsets"])
@pytest.mark.parametrize("damage", ["missing", "cut", "short", "pickled"])
def test_damaged_data_sets_are_refused(tmp_path, name, damage):
    folder = tmp_path / "data"
    TokenDataset.write(folder, EXAMPLES)
    file = folder / f"{name}.npy"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "short":
        np.save(file, np.load(file)[:-1])
    else:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="data set 'data'"):
        TokenDataset.open(folder)
