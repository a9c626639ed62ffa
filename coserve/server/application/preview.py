"""What would be trained of a file: its first rows as text, tokens and labels, and what becomes of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from coserve.tokenizer import Tokenizer
from coserve.training.chat_data import Example
from coserve.training.data_file import Counts, DataFile, FileRow, bounded_lines
from coserve.training.dataset import NOT_TRAINED

DEFAULT_ROWS = 10
MAX_ROWS = 1000
_ANSWERS = {1: ("",), 2: ("chosen", "rejected")}


@dataclass(frozen=True)
class Shown:
    """One example of a row, the answer of a preference that it is, and its text in runs of tokens that are
    all trained or all not: (text, trained)."""

    row: FileRow
    answer: str
    example: Example
    spans: list[tuple[str, bool]]


@dataclass(frozen=True)
class Preview:
    """Examples in file order, those that training would drop too, with the rows' counts and kind."""

    shown: list[Shown]
    counts: Counts
    kind: str


def preview(source: bytes | Path, tokenizer: Tokenizer, max_length: int, limit: int) -> Preview:
    """What the first `limit` lines come to.

    Raises DatasetError that names the bad lines among them, InvalidRequest for a file of another format.
    """
    with ExitStack() as stack:
        opened = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
        file = DataFile(islice(bounded_lines(opened), limit), tokenizer, max_length, param="file_id")
        shown = [one for row in file.rows() for one in _examples(row, tokenizer)]
    return Preview(shown, file.counts, str(file.kind or ""))


def _examples(row: FileRow, tokenizer: Tokenizer) -> Iterator[Shown]:
    for answer, example in zip(_ANSWERS[len(row.examples)], row.examples, strict=True):
        # Rows of token ids have no text of their own.
        text = example.text or tokenizer.decode(example.token_ids, skip_special_tokens=False)
        example = Example(text, example.token_ids, example.labels)
        yield Shown(row, answer, example, list(_spans(example, tokenizer)))


def _spans(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    tokens = enumerate(zip(example.token_ids, example.labels, strict=True))
    # The first token is never a target, whatever its label.
    for trained, run in groupby(tokens, lambda token: token[0] > 0 and token[1][1] != NOT_TRAINED):
        ids = [token_id for _, (token_id, _) in run]
        yield tokenizer.decode(ids, skip_special_tokens=False, continues_text=True), trained
