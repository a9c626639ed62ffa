"""Long work in pieces: a generator that yields between two of them, where it may rest, and returns a result.

What rests keeps its state in its frame, so going on gives the same bits; who drops it drops its work.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Pieces = Generator[None, None, Result]


def whole(pieces: Pieces[Result]) -> Result:
    """Run what is left of it, and return its result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            found: Result = end.value
            return found
