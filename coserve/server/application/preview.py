"""What would be trained of a file: its first rows as text, tokens and labels."""

from __future__ import annotations

import io
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from coserve.tokenizer import Tokenizer
from coserve.training.chat_data import Example
from coserve.training.data_file import DataFile, bounded_lines

DEFAULT_ROWS = 10
MAX_ROWS = 1000


def preview(source: bytes | Path, tokenizer: Tokenizer, max_length: int, limit: int) -> list[Example]:
    """The examples of the first `limit` lines in file order, those that training would drop too.

    Raises DatasetError that names the bad lines among them.
    """
    with ExitStack() as stack:
        file = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
        rows = DataFile(islice(bounded_lines(file), limit), tokenizer, max_length, param="file_id").rows()
        return [_with_text(example, tokenizer) for row in rows for example in row.examples]


def _with_text(example: Example, tokenizer: Tokenizer) -> Example:
    """Rows of token ids have no text of their own."""
    text = example.text or tokenizer.decode(example.token_ids, skip_special_tokens=False)
    return Example(text, example.token_ids, example.labels)
