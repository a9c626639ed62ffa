"""What would be trained of a file: the rows as text, tokens and labels."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from coserve.errors import DatasetError, InvalidRequest, LineError
from coserve.tokenizer import Tokenizer
from coserve.training.chat_data import Example, preview_row

DEFAULT_ROWS = 10
MAX_ROWS = 1000
_BOM = b"\xef\xbb\xbf"


def preview(source: bytes | Path, tokenizer: Tokenizer, max_length: int, limit: int) -> list[Example]:
    """The first `limit` rows in file order; DatasetError names the bad lines among them."""
    rows: list[Example] = []
    bad: list[LineError] = []
    with ExitStack() as stack:
        lines = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
        for number, line in enumerate(islice(lines, limit), start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                rows.append(preview_row(json.loads(line), tokenizer, max_length))
            except InvalidRequest as error:
                bad.append(LineError(number, error.param or "", error.message))
            except (ValueError, RecursionError):
                bad.append(LineError(number, "", "is not valid JSON"))
    if bad:
        raise DatasetError(bad, len(bad), param="file_id")
    return rows
