"""Runs a microbatch's units in calls that may rest between two pieces and go on later, to the same bits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

from coserve.core.training_sequence import TrainingSequence


def never() -> bool:
    """A call that stops for nobody."""
    return False


class Call(NamedTuple):
    """Units of a sequence that ran as one, or a part of that if it isn't `done`; the seconds of its longest
    piece, and what went wrong."""

    sequence: TrainingSequence
    length: int
    done: bool = True
    piece: float = 0.0
    error: Exception | None = None


class Stop:
    """Whether work in pieces rests after one: once a message waits, with `arrivals`, else where another piece
    as long as the longest so far would end after `deadline` (time.perf_counter())."""

    def __init__(self, deadline: float, arrivals: Callable[[], bool] | None, longest: float = 0.0) -> None:
        self.longest = longest
        self._deadline, self._arrivals = deadline, arrivals
        self._last = time.perf_counter()

    def __call__(self) -> bool:
        now = time.perf_counter()
        self.longest, self._last = max(self.longest, now - self._last), now
        return self._arrivals() if self._arrivals is not None else now + self.longest > self._deadline


class UnitCalls(ABC):
    """`cursor` is the next unit's index."""

    def __init__(self) -> None:
        self.cursor = 0
        self._call: Iterator[None] | None = None

    def run_next(self, length: int = 1, stop: Callable[[], bool] = never) -> bool:
        """Run the next `length` units as one call; whether it is done. It rests after a piece when `stop()`,
        and goes on when it is asked for again. IndexError when fewer units are left, ValueError where they
        don't join."""
        call, self._call = self._call or self._pieces(length), None
        for _ in call:
            if stop():
                self._call = call
                return False
        self.cursor += length
        return True

    @abstractmethod
    def _pieces(self, length: int) -> Iterator[None]:
        """Run the next `length` units as one call, and yield between its pieces."""
