"""What a reader of tool calls says about generated text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Opened:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the open call's arguments, JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class NoCall:
    """Text inside a block of calls that is none."""

    text: str


Event = Opened | Arguments | NoCall


class Reader(Protocol):
    """Reads one block of calls as it is generated.

    It never looks back: the same text gives the same events, joined, however it was cut.
    """

    @property
    def held(self) -> int:
        """Characters taken about which nothing has been said yet."""

    @property
    def open(self) -> bool:
        """Whether a call's arguments have begun and not ended."""

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        """(what is certain now, the text after the block or None while it goes on)."""

    def finish(self) -> list[Event]:
        """What is left where the output ends inside the block."""


def begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` without being it."""
    if not mark:
        return 0
    place = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while place >= 0:
        if mark.startswith(text[place:]):
            return len(text) - place
        place = text.find(mark[0], place + 1)
    return 0
