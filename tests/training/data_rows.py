"""Rows of training files for tests, and what is trained of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coserve.tokenizer import Tokenizer
from coserve.training.chat_data import Example, encode_row
from coserve.training.rows import BadRow, check_row
from tests import tokenizers as made

TOKENIZER = made.byte_level()
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def lines(*rows: Any) -> list[bytes]:
    """Lines of a file; bytes stand for themselves."""
    return [(row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows]


def encode(row: Any, tokenizer: Tokenizer = TOKENIZER) -> Example:
    (example,) = encode_row(check_row(row, tokenizer), tokenizer)
    return example


def encode_pair(row: Any, tokenizer: Tokenizer = TOKENIZER) -> tuple[Example, Example]:
    """(chosen, rejected)."""
    chosen, rejected = encode_row(check_row(row, tokenizer), tokenizer)
    return chosen, rejected


def refusal_of(row: Any, tokenizer: Tokenizer = TOKENIZER) -> tuple[str, str]:
    """(field, reason)."""
    with pytest.raises(BadRow) as caught:
        encode_row(check_row(row, tokenizer), tokenizer)
    return caught.value.field, caught.value.reason


def trained_text(example: Example, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The trained runs of tokens, as text."""
    runs: list[str] = []
    run: list[int] = []
    for token_id, label in [*zip(example.token_ids, example.labels, strict=True), (0, -100)]:
        assert label in (token_id, -100)
        if label == -100 and run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False, continues_text=True))
            run = []
        elif label != -100:
            run.append(token_id)
    return runs
