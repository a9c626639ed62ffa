"""A training sequence: one microbatch of packed samples. It owes each token forward, then backward.

The backward is a list of units in a fixed order (loss chunks, then layer by layer from the top, windows last
to first). Which units there are follows from the data and the configuration; the scheduler only decides when
each runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from coserve.core.sequence import Sequence

TILE = 64  # sums over tokens run in tiles of this many, so cuts at multiples of it change no bit


@dataclass(frozen=True, slots=True)
class BackwardUnit:
    """`kind` is "loss" or "layer"; `tokens` is the work in it, for the latency model."""

    kind: str
    tokens: int


class TrainingSequence(Sequence):
    """A microbatch of a job's optimizer step.

    `index` is its place among the step's microbatches: backward passes of one job go in index order.
    `slabs` is the pool memory its activations need; `extent` is where they lie once reserved.
    """

    def __init__(
        self,
        sequence_id: str,
        job_id: str,
        index: int,
        num_tokens: int,
        backward_units: tuple[BackwardUnit, ...],
        *,
        adapter: str,
        slabs: int,
        window_tokens: int = 0,
    ) -> None:
        super().__init__(sequence_id, adapter)
        self.job_id = job_id
        self.index = index
        self._num_tokens = num_tokens
        self.backward_units = backward_units
        self.backward_cursor = 0
        self.slabs = slabs
        self.window_tokens = window_tokens
        self.extent: int | None = None
        self.evictions = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the microbatch."""
        return self._num_tokens

    @property
    def forward_done(self) -> bool:
        """Every token has gone forward."""
        return self.cursor >= self._num_tokens

    @property
    def backward_owed(self) -> int:
        """Backward units still to run."""
        return len(self.backward_units) - self.backward_cursor

    @property
    def done(self) -> bool:
        """Forward and backward are complete."""
        return self.forward_done and self.backward_owed == 0

    def window(self, most: int, affordable: int) -> int:
        """Length of the next forward window: at most `most` tokens, and about as many as are `affordable`.

        A job that set its own width gets it (the caller weighs its cost); others are cut at tile edges.
        """
        owed = self.forward_owed
        if self.window_tokens:
            length = min(self.window_tokens, owed, most)
            return length if length == owed or self.window_tokens % TILE else length // TILE * TILE
        limit = min(most, max(affordable, TILE))
        return owed if owed <= limit else (self.cursor + limit) // TILE * TILE - self.cursor

    def restart(self) -> None:
        """Its activations are gone: everything is owed again."""
        self.cursor = 0
        self.backward_cursor = 0
        self.extent = None
