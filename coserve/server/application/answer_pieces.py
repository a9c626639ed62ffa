"""What an answer is made of, in the order it was said."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote for itself, before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool call begins: its place among the answer's calls, its id and the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, JSON text."""

    index: int
    text: str


Piece = Content | Reasoning | CallOpened | CallArguments
