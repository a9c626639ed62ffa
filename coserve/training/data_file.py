"""A training file read line by line: rows checked, tokenised, cut at the maximal length, counted. Torch-free.

A file of any length passes through in constant memory; nothing here keeps rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from coserve.errors import DatasetError, InvalidRequest, LineError
from coserve.tokenizer import Tokenizer
from coserve.training.chat_data import Example, encode_row
from coserve.training.dataset import count_trained
from coserve.training.rows import BadRow, Kind, check_row, kind_of, kinds_of

MAX_LISTED_ERRORS = 50
MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
# How files begin that hold no JSON lines, and what to do about it.
_NOT_TEXT = {
    b"\x1f\x8b": "is compressed (gzip); upload the JSONL itself",
    b"PK\x03\x04": "is a zip archive; upload the JSONL itself",
    b"(\xb5/\xfd": "is compressed (zstd); upload the JSONL itself",
    b"PAR1": "is a Parquet file; write it as JSONL, one JSON object a line",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
}
_NOT_JSONL = {
    b"[": "is one JSON array; write its objects one a line, without the brackets and commas around them",
    b"{": "spreads a JSON object over several lines; write one object a line",
}

UNTRAINED = "no trained token in them"
CUT_AWAY = "no trained token left by the cut at the maximal length"
CUT_ALIKE = "both answers the same after the cut at the maximal length"


@dataclass
class Counts:
    """What came of a file. `rows` that were valid; `examples` kept of them (a preference row is one), with
    their `tokens` (both answers'), those of them that are `trained_tokens`, and the `longest` in tokens;
    how many examples were `truncated` at the maximal length, losing `cut_tokens`; and how many rows were
    `dropped`, by reason."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class FileRow:
    """One valid row: its 1-based `line`, its example (of a preference row: chosen, rejected), cut at the
    maximal length by `cut_tokens` in all, and why it was `dropped`, if it was."""

    line: int
    kind: Kind
    examples: tuple[Example, ...]
    cut_tokens: int = 0
    dropped: str = ""


class DataFile:
    """An iterator of (token_ids, labels) that reads the file as it goes; iterate it once, here or in `rows`.

    `lines` are the file's, in bytes (see `bounded_lines`); `max_length` 0 is no limit. `method` says which
    kinds of rows are taken; without one any is. All rows must be of one kind, that of `like` where it is
    given (the training file's, for a validation file). `vocab_size` is the model's, as a tokenizer may know
    more tokens than the model has embeddings for. With `pairs`, examples 2i and 2i + 1 are the chosen
    and the rejected answer of a preference.

    Too long an example is cut at its end, so that its beginning and its prompt stay whole. What has no
    trained token then is dropped, a preference together: when either answer is lost, or what is left of both
    is the same. `counts` are final when the iteration is over. It ends with DatasetError when any line is bad
    (all lines are looked at first; at most 50 are listed), with InvalidRequest when the file holds no JSON
    lines or nothing is left to train on; `param` says which file it is.
    """

    def __init__(
        self,
        lines: Iterable[bytes],
        tokenizer: Tokenizer,
        max_length: int,
        method: str | None = None,
        param: str = "training_file",
        like: Kind | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.counts = Counts()
        self.kind: Kind | None = None
        self.errors: list[LineError] = []
        self.error_count = 0
        self._lines = lines
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._method = method
        self._kinds = kinds_of(method) if method else tuple(Kind)
        self._param = param
        self._like = like
        self._unknown_from = tokenizer.id_limit if vocab_size is None else vocab_size
        self._first_line = 0

    @property
    def pairs(self) -> bool:
        """Whether the method learns from preferences."""
        return self._kinds == (Kind.PREFERENCE,)

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        for row in self.rows():
            if not row.dropped:
                for example in row.examples:
                    yield example.token_ids, example.labels
        if not self.counts.examples:
            dropped = "; ".join(f"{count} dropped, {why}" for why, count in self.counts.dropped.items())
            raise self._refusal(f"has no row left to train on: {dropped}" if dropped else "holds no rows")

    def rows(self) -> Iterator[FileRow]:
        """Every valid row, the dropped ones too; ends with DatasetError when a line was bad."""
        for number, value in self._values():
            try:
                kind = self._one_kind(number, kind_of(value))
                examples = encode_row(check_row(value, self._tokenizer), self._tokenizer)
                self._check_ids(examples)
            except BadRow as refused:
                self._error(number, refused.field, refused.reason)
                continue
            yield self._counted(self._cut(number, kind, examples))
        if self.error_count:
            raise DatasetError(self.errors, self.error_count, param=self._param)

    def _one_kind(self, line: int, kind: Kind) -> Kind:
        if self.kind is None:
            reason = ""
            if kind not in self._kinds:
                hint = "; preferences are for the method dpo" if kind is Kind.PREFERENCE else ""
                reason = f"is a {kind} row; method {self._method} takes {', '.join(self._kinds)} rows{hint}"
            elif self._like not in (None, kind):
                reason = f"is a {kind} row; the training file has {self._like} rows"
            if reason:
                raise DatasetError([LineError(line, "", reason)], 1, param=self._param)
            self.kind, self._first_line = kind, line
        if kind is not self.kind:
            raise BadRow(
                "", f"is a {kind} row, line {self._first_line} a {self.kind} row; a file has one kind of rows"
            )
        return kind

    def _check_ids(self, examples: tuple[Example, ...]) -> None:
        largest = max((max(example.token_ids, default=-1) for example in examples), default=-1)
        if largest >= self._unknown_from:
            token = self._tokenizer.token_text(largest)
            raise BadRow(
                "",
                f"holds the token {token!r} (id {largest}), for which the model has no embedding: "
                f"it has {self._unknown_from}",
            )

    def _cut(self, line: int, kind: Kind, examples: tuple[Example, ...]) -> FileRow:
        if not all(count_trained(example.labels) for example in examples):
            return FileRow(line, kind, examples, dropped=UNTRAINED)
        limit = self._max_length
        cut = sum(max(0, len(example.token_ids) - limit) for example in examples) if limit else 0
        if not cut:
            return FileRow(line, kind, examples)
        kept = tuple(Example(e.text, e.token_ids[:limit], e.labels[:limit]) for e in examples)
        dropped = ""
        if not all(count_trained(example.labels) for example in kept):
            dropped = CUT_AWAY
        elif len(kept) == 2 and kept[0].token_ids == kept[1].token_ids:
            dropped = CUT_ALIKE
        return FileRow(line, kind, kept, cut, dropped)

    def _counted(self, row: FileRow) -> FileRow:
        counts = self.counts
        counts.rows += 1
        if row.dropped:
            counts.dropped[row.dropped] += 1
            return row
        counts.examples += 1
        counts.truncated += row.cut_tokens > 0
        counts.cut_tokens += row.cut_tokens
        for example in row.examples:
            counts.tokens += len(example.token_ids)
            counts.trained_tokens += count_trained(example.labels)
            counts.longest = max(counts.longest, len(example.token_ids))
        return row

    # ---------------------------------------------------------------- lines

    def _values(self) -> Iterator[tuple[int, Any]]:
        """(1-based line number, parsed JSON) of every line that parses; the others are noted as errors."""
        blank = 0  # the first of a run of blank lines, which are tolerated at the end of the file only
        for number, line in enumerate(self._lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
                self._check_beginning(line)
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                self._blank_lines(blank, number)
                blank = 0
            if len(line) > MAX_LINE_BYTES:
                self._error(number, "", f"is over {MAX_LINE_BYTES // 2**20} MiB long; write one row a line")
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                self._error(number, "", f"is not UTF-8 text (byte {error.start + 1})")
            except json.JSONDecodeError as error:
                self._error(number, "", f"is not valid JSON ({error.msg} at column {error.colno})")
            except (RecursionError, ValueError):
                self._error(
                    number, "", "is not JSON that can be read (nested too deeply, or a number too long)"
                )
            else:
                yield number, value

    def _check_beginning(self, line: bytes) -> None:
        for mark, reason in _NOT_TEXT.items():
            if line.startswith(mark):
                raise self._refusal(reason)
        if line[1:2] == b"\0" or line[:1] == b"\0":
            raise self._refusal(_NOT_TEXT[b"\xff\xfe"])
        reason = _NOT_JSONL.get(line.strip(), "")
        if reason or line.lstrip().startswith(b"[{"):
            raise self._refusal(reason or _NOT_JSONL[b"["])

    def _refusal(self, reason: str) -> InvalidRequest:
        """What is wrong with the file as a whole."""
        text = f"the {self._param.replace('_', ' ')} {reason}"
        return InvalidRequest(text, param=self._param, code=DatasetError.default_code)

    def _blank_lines(self, first: int, after: int) -> None:
        for number in range(first, min(after, first + MAX_LISTED_ERRORS)):
            self._error(number, "", "is empty")
        self.error_count += max(0, after - first - MAX_LISTED_ERRORS)

    def _error(self, line: int, where: str, reason: str) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_LISTED_ERRORS:
            self.errors.append(LineError(line, where, reason))


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a binary file. Of one over `MAX_LINE_BYTES` only a little more than that is given, so that
    its reader can tell; no more than that is ever in memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
