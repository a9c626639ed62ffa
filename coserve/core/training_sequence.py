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
    """`kind` is "loss" or "layer"; `tokens` is the work in it, for the latency model. A layer's `height` is
    counted from the lowest that has a backward."""

    kind: str
    tokens: int
    height: int = 0


class TrainingSequence(Sequence):
    """A microbatch of a job's optimizer step.

    `index` is its place among the step's microbatches: backward passes of one job go in index order.
    `level_slabs` is the pool memory its activations need at each level, ascending: at 0 every layer keeps
    what policy C does, the first half of the others gives one layer more policy B, the second half A, from
    the lowest layer up. `extent` is where they lie once reserved, at `level`.
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
        level_slabs: tuple[int, ...],
        window_tokens: int = 0,
    ) -> None:
        super().__init__(sequence_id, adapter)
        self.job_id = job_id
        self.index = index
        self._num_tokens = num_tokens
        self.backward_units = backward_units
        self.backward_cursor = 0
        self.level_slabs = level_slabs
        self.level = 0
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

    @property
    def slabs(self) -> int:
        """Slabs of its extent, had or to be had, at the level in force."""
        return self.level_slabs[self.level]

    @property
    def layers(self) -> int:
        """Layers that have a backward."""
        return len(self.level_slabs) // 2

    def policy(self, height: int) -> str:
        """ "A", "B" or "C": what the layer at `height` keeps at the level in force."""
        if self.level >= self.layers + height + 1:
            return "A"
        return "B" if self.level >= height + 1 else "C"

    def unit_kind(self, index: int) -> str:
        """What the latency model should call backward unit `index`: a layer's cost goes by its policy."""
        unit = self.backward_units[index]
        return f"layer_{self.policy(unit.height).lower()}" if unit.kind == "layer" else unit.kind

    @property
    def level_in_use(self) -> int:
        """The level in force, less what only layers had whose backward is over."""
        if self.backward_cursor >= len(self.backward_units):
            return 0
        unit = self.backward_units[self.backward_cursor]
        if unit.kind != "layer":
            return self.level
        open_layers = unit.height + 1
        return min(self.level, open_layers + (self.layers if self.level > self.layers else 0))

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
