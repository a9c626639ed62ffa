"""A sequence owes tokens. That is all the scheduler has to know about it.

A `Request` owes the tokens of its prompt and then one per step; a `TrainingSequence` owes a forward token and
then a backward token for every token of its data. Spans pay, cursors move.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Sequence(ABC):
    """Anything a step can spend tokens on. `cursor` counts the tokens whose forward is done."""

    def __init__(self, sequence_id: str, adapter: str | None) -> None:
        self.sequence_id = sequence_id
        self.adapter = adapter
        self.cursor = 0

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """All tokens known now."""

    @property
    def forward_owed(self) -> int:
        """Forward tokens still to pay."""
        return self.num_tokens - self.cursor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sequence_id}, {self.cursor}/{self.num_tokens})"
