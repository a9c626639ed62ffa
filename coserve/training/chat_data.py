"""Training files to tokens and labels, by the model's own chat template.

What is trained of a conversation: the content of each assistant turn whose weight isn't 0, with the token
that ends the turn, without the turn's header. Where a turn lies in the text follows from rendering prefixes:
with M the messages, the turn i begins where render(M[:i], add_generation_prompt) ends, which is also what
the model sees when it answers. The text is tokenised once, as a whole, so the ids are those that the chat
route makes of the same messages; a token is trained when it covers any character of a trained turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from coserve.errors import CoserveError, DatasetError, InvalidRequest, LineError
from coserve.tokenizer import Tokenizer
from coserve.training.chat_rows import BadRow, ChatRow, CompletionRow, check_row
from coserve.training.dataset import NOT_TRAINED, count_trained

MAX_LISTED_ERRORS = 50
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it: its text, token ids [T], and labels [T] (-100 where not trained)."""

    text: str
    token_ids: list[int]
    labels: list[int]


@dataclass
class ChatDataset:
    """An iterator of (token_ids, labels) that reads the file as it goes; iterate it once.

    The counts are final when the iteration is over: `examples` kept, their `tokens` and `trained_tokens`,
    how many of them were `truncated` at `max_length`, and how many rows were `dropped` because no trained
    token was left. The iteration ends with DatasetError when any line is bad (all lines are looked at first;
    at most 50 are listed), with InvalidRequest when nothing is left to train on.
    """

    lines: Iterable[bytes]
    tokenizer: Tokenizer
    max_length: int
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    errors: list[LineError] = field(default_factory=list)
    error_count: int = 0

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        for number, value in self._values():
            try:
                example = encode_row(check_row(value, self.tokenizer), self.tokenizer)
            except BadRow as bad:
                self._error(number, bad.field, bad.reason)
                continue
            kept = self._kept(example)
            if kept is not None:
                yield kept
        if self.error_count:
            raise DatasetError(self.errors, self.error_count)
        if not self.examples:
            reason = (
                f"none of the {self.dropped} rows has a trained token within max_length"
                if self.dropped
                else "the file holds no rows"
            )
            raise InvalidRequest(reason, param="training_file", code=DatasetError.default_code)

    def _kept(self, example: Example) -> tuple[list[int], list[int]] | None:
        token_ids, labels = example.token_ids, example.labels
        too_long = 0 < self.max_length < len(token_ids)
        if too_long:
            token_ids, labels = token_ids[: self.max_length], labels[: self.max_length]
        trained = count_trained(labels)
        if trained == 0:
            self.dropped += 1
            return None
        self.examples += 1
        self.tokens += len(token_ids)
        self.trained_tokens += trained
        self.truncated += too_long
        return token_ids, labels

    def _values(self) -> Iterator[tuple[int, Any]]:
        """(1-based line number, parsed JSON) of every line that parses; the others are noted as errors."""
        blank: list[int] = []  # blank lines are tolerated at the end of the file only
        for number, line in enumerate(self.lines, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                blank.append(number)
                continue
            for empty in blank:
                self._error(empty, "", "is empty")
            blank.clear()
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

    def _error(self, line: int, where: str, reason: str) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_LISTED_ERRORS:
            self.errors.append(LineError(line, where, reason))


def read_chat_examples(lines: Iterable[bytes], tokenizer: Tokenizer, max_length: int) -> ChatDataset:
    """Rows of a JSONL file (bytes, line by line) as training examples; `max_length` 0 means no limit."""
    return ChatDataset(lines, tokenizer, max_length)


def preview_row(value: Any, tokenizer: Tokenizer, max_length: int = 0) -> Example:
    """What would be trained of one parsed row, cut at `max_length` tokens (the text stays whole).

    Raises InvalidRequest naming the field.
    """
    try:
        example = encode_row(check_row(value, tokenizer), tokenizer)
    except BadRow as bad:
        raise InvalidRequest(bad.reason, param=bad.field or None) from bad
    if max_length:
        return Example(example.text, example.token_ids[:max_length], example.labels[:max_length])
    return example


def encode_row(row: ChatRow | CompletionRow, tokenizer: Tokenizer) -> Example:
    """Text, ids and labels of a valid row. Raises BadRow when the chat template can't place its turns."""
    if isinstance(row, CompletionRow):
        return _encode_completion(row, tokenizer)
    try:
        text, spans = _trained_spans(row, tokenizer)
        return _label(text, spans, tokenizer)
    except CoserveError as error:
        raise BadRow(error.param or "messages", error.message) from error


def _encode_completion(row: CompletionRow, tokenizer: Tokenizer) -> Example:
    text = row.prompt + row.completion
    body = _label(text, [(len(row.prompt), len(text))], tokenizer)
    bos = tokenizer.encode("")
    bos = bos if bos == [tokenizer.bos_id] and body.token_ids[:1] != bos else []
    eos = [] if tokenizer.eos_id is None or body.token_ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
    shown = (
        (tokenizer.token_text(bos[0]) if bos else "") + text + (tokenizer.token_text(eos[0]) if eos else "")
    )
    return Example(shown, bos + body.token_ids + eos, [NOT_TRAINED] * len(bos) + body.labels + eos)


def _label(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Example:
    """Tokenise `text` and label the tokens that overlap one of the ascending character `spans`."""
    encoded = tokenizer.encode_with_offsets(text)
    labels = [NOT_TRAINED] * len(encoded.token_ids)
    remaining = iter(spans)
    begin, end = next(remaining, (len(text), len(text)))
    for position, (token_begin, token_end) in enumerate(encoded.offsets):
        while token_begin >= end < len(text):
            begin, end = next(remaining, (len(text), len(text)))
        overlaps = token_begin < token_end and token_begin < end and token_end > begin
        # A header's special token may have swallowed the white space a turn begins with; it stays header.
        if overlaps and (token_begin >= begin or encoded.token_ids[position] not in tokenizer.special_ids):
            labels[position] = encoded.token_ids[position]
    return Example(text, encoded.token_ids, labels)


# ---------------------------------------------------------------- where the assistant's turns lie


def _trained_spans(row: ChatRow, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    text = tokenizer.render_chat(row.messages, row.tools, add_generation_prompt=False)
    starts = [
        _turn_start(row, index, text, tokenizer) if message["role"] == "assistant" else None
        for index, message in enumerate(row.messages)
    ]
    spans = []
    for index, start in enumerate(starts):
        if start is not None and row.trained[index]:
            following = [later for later in starts[index + 1 :] if later is not None]
            limit = following[0] if following else len(text)
            spans.append((start, _turn_end(row, index, start, limit, text, tokenizer)))
    return text, spans


def _turn_start(row: ChatRow, index: int, text: str, tokenizer: Tokenizer) -> int:
    if index == 0:
        prompt = _header_of_first_turn(row, tokenizer)
    else:
        prompt = tokenizer.render_chat(row.messages[:index], row.tools, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _no_prefix(index)
    return len(prompt)


def _header_of_first_turn(row: ChatRow, tokenizer: Tokenizer) -> str:
    """The text before a conversation's first message where that is the assistant's own: what two different
    answers have in common."""
    texts = [
        tokenizer.render_chat(
            [{"role": "assistant", "content": word}], row.tools, add_generation_prompt=False
        )
        for word in ("a", "b")
    ]
    differing = (i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
    return texts[0][: next(differing, None)]


def _turn_end(row: ChatRow, index: int, start: int, limit: int, text: str, tokenizer: Tokenizer) -> int:
    """The character after the turn's end token (or after its text, where the template writes none)."""
    alone = tokenizer.render_chat(row.messages[: index + 1], row.tools, add_generation_prompt=False)
    for end in _end_candidates(alone, start, tokenizer):
        if end <= limit and text.startswith(alone[:end]):
            return end
    # Some templates write earlier turns differently (Qwen3 leaves out their reasoning); as no message holds
    # special tokens, the first end token after the turn's start is the turn's own.
    found = [(text.find(token, start, limit), token) for token in tokenizer.eos_texts]
    ends = [at + len(token) for at, token in found if at >= 0]
    if not ends:
        raise _no_prefix(index)
    return min(ends)


def _end_candidates(alone: str, start: int, tokenizer: Tokenizer) -> list[int]:
    """Where the last turn of `alone` may end, best guess first.

    The text ends in a run of special tokens and white space. The turn ends with the run's first token that
    ends generation; failing that with its last, then with earlier ones; with no run, at the end of the text.
    """
    special = {*tokenizer.special_texts, *tokenizer.eos_texts}
    run: list[tuple[int, str]] = []
    rest = alone[start:].rstrip()
    while token := max((text for text in special if rest.endswith(text)), key=len, default=""):
        run.append((start + len(rest), token))
        rest = rest.removesuffix(token).rstrip()
    if not run:
        return [len(alone)]
    ending = [at for at, token in reversed(run) if token in tokenizer.eos_texts]
    return [*ending, *(at for at, token in run if token not in tokenizer.eos_texts)]


def _no_prefix(index: int) -> InvalidRequest:
    return InvalidRequest(
        "the chat template renders this turn differently once later messages follow, so what to train on "
        "can't be told; split the conversation into one row a turn, or give the server another template",
        param=f"messages[{index}]",
    )
