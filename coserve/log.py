"""The log: one plain line an event, `time level logger message key=value ...`, on stderr or to a file.

Messages carry identifiers, counts and reasons; never a key, a prompt or generated text.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

QUIET = ("httpx", "httpcore", "asyncio", "grpc._cython.cygrpc", "uvicorn.access", "multipart")


def line(event: str, **values: object) -> str:
    """`event key=value ...`, values with spaces or quotes in them quoted."""
    return " ".join([event, *(f"{key}={_word(value)}" for key, value in values.items())])


def _word(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    plain = text and text.isprintable() and not any(character in ' "=' for character in text)
    return text if plain else '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def configure(level: str = "info", file: Path | None = None, stream: TextIO | None = None) -> None:
    """Send the log of `coserve` and of the libraries to `file`, or to `stream` (stderr)."""
    handler: logging.Handler
    handler = (
        logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(stream or sys.stderr)
    )
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
