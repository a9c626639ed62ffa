"""Tokenised training data on disk: three flat arrays that any process can map.

    tokens.npy   int32 [total]     token ids of all examples, one after the other
    labels.npy   int32 [total]     the token's own id where it is trained, -100 where not
    offsets.npy  int64 [examples+1] where each example begins
    meta.json    {"pairs": ...}    true: examples 2i and 2i + 1 are the chosen and rejected answer of a pair

A label is aligned with its own token: the loss of predicting token t from the tokens before it is counted
where labels[t] != -100. The first token of an example is never a target.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from coserve.errors import ConfigError, Conflict, InvalidRequest

NOT_TRAINED = -100
_META = "meta.json"


class TokenDataset:
    """A read-only data set, memory-mapped; index it by example. `pairs`: examples 2i and 2i + 1 belong
    together, the chosen and the rejected answer of one preference."""

    def __init__(
        self, tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, pairs: bool = False
    ) -> None:
        self.tokens = tokens
        self.labels = labels
        self.offsets = offsets
        self.pairs = pairs

    @classmethod
    def write(
        cls,
        directory: str | Path,
        examples: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
        *,
        pairs: bool = False,
    ) -> int:
        """Write (token_ids, labels) as they come; the directory appears whole or not at all.

        Returns the number of examples. Raises InvalidRequest when there are none, or an odd number of what
        should be pairs, Conflict when the directory exists, and whatever `examples` raises (nothing is left
        behind then).
        """
        target = Path(directory)
        if target.exists():
            raise Conflict(f"a data set {target.name!r} exists already")
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            count = _write_arrays(temporary, examples)
            if count == 0:
                raise InvalidRequest("the training file holds no example", param="training_file")
            if pairs and count % 2:
                raise InvalidRequest(f"{count} examples make no pairs", param="training_file")
            with open(temporary / _META, "wb") as meta:
                meta.write(json.dumps({"pairs": pairs}).encode())
                _sync(meta)
            _sync_directory(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(target.parent)
        return count

    @classmethod
    def open(cls, directory: str | Path) -> TokenDataset:
        """Map a data set; raises ConfigError when files are missing or don't fit together."""
        folder = Path(directory)
        try:
            tokens, labels, offsets = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("tokens", "labels", "offsets")
            )
            pairs = json.loads((folder / _META).read_bytes())["pairs"]
        except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
            raise ConfigError(
                f"data set {folder.name!r} cannot be read: {error}", param="data_path"
            ) from error
        whole = (
            tokens.dtype == labels.dtype == np.int32
            and offsets.dtype == np.int64
            and tokens.ndim == labels.ndim == offsets.ndim == 1
            and len(tokens) == len(labels)
            and len(offsets) >= 2
            and offsets[0] == 0
            and offsets[-1] == len(tokens)
            and bool((np.diff(offsets) > 0).all())
            and (pairs is False or (pairs is True and len(offsets) % 2 == 1))
        )
        if not whole:
            raise ConfigError(f"data set {folder.name!r} is damaged; prepare it again", param="data_path")
        return cls(tokens, labels, offsets, pairs)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, labels) of one example, int32 [T] each, views of the map."""
        where = self._slice(index)
        return self.tokens[where], self.labels[where]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    def trained_tokens(self, index: int) -> int:
        """Number of tokens of an example that carry loss."""
        return count_trained(self.labels[self._slice(index)])

    def _slice(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))


def count_trained(labels: Sequence[int] | np.ndarray) -> int:
    """Trained tokens of one example: labels other than -100, the first position left out."""
    return int(np.count_nonzero(np.asarray(labels)[1:] != NOT_TRAINED))


def _write_arrays(
    folder: Path, examples: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]
) -> int:
    offsets = array("q", [0])
    with open(folder / "tokens.npy", "wb") as tokens_file, open(folder / "labels.npy", "wb") as labels_file:
        for file in (tokens_file, labels_file):
            _write_header(file, 0)
        for token_ids, labels in examples:
            if len(token_ids) != len(labels) or len(token_ids) == 0:
                raise InvalidRequest(
                    f"example {len(offsets)} has {len(token_ids)} tokens and {len(labels)} labels",
                    param="training_file",
                )
            tokens_file.write(np.asarray(token_ids, dtype=np.int32).tobytes())
            labels_file.write(np.asarray(labels, dtype=np.int32).tobytes())
            offsets.append(offsets[-1] + len(token_ids))
        for file in (tokens_file, labels_file):
            file.seek(0)
            _write_header(file, offsets[-1])
            _sync(file)
    with open(folder / "offsets.npy", "wb") as offsets_file:
        np.save(offsets_file, np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)
        _sync(offsets_file)
    return len(offsets) - 1


def _write_header(file: BinaryIO, length: int) -> None:
    # numpy pads the header so that the shape may grow: it is rewritten in place when the length is known.
    npy.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (length,)})


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
