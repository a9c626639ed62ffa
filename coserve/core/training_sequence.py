"""A training sequence: one microbatch of packed samples. It owes each token forward, then backward.

More exactly it owes *passes*: a forward over all its tokens with one adapter, then units in a fixed order.
The last pass of a microbatch in training has the loss chunks and the backward (layer by layer from the top,
windows last to first); passes before it, and all passes of an evaluation, only score tokens. Which passes
and units there are follows from the data and the configuration; the scheduler only decides when each runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from coserve.core.sequence import Sequence

TILE = 64  # sums over tokens run in tiles of this many, so cuts at multiples of it change no bit
NARROW = 16  # tokens of a window in the requests' batch at least


@dataclass(frozen=True, slots=True)
class TrainingUnit:
    """`kind` is "score", "loss" or "layer"; `tokens` is the work in it, for the latency model. A layer's
    `height` is counted from the lowest that has a backward. `joins`: it may run in one call with the unit
    before it, and no bit shows whether it did."""

    kind: str
    tokens: int
    height: int = 0
    joins: bool = False


@dataclass(frozen=True, slots=True)
class TrainingPass:
    """All tokens forward with `adapter` (None: the base alone), then `units`, at least one, in order.

    `trains`: its units make gradients; one pass of a sequence at most does, the last.
    """

    adapter: str | None
    units: tuple[TrainingUnit, ...]
    trains: bool = False


@dataclass(frozen=True, slots=True)
class RestingCall:
    """A call of the next `length` units that stopped between two pieces: the `seconds` it took so far, and
    the longest of its pieces."""

    length: int
    seconds: float
    piece: float


class TrainingSequence(Sequence):
    """A microbatch of a job's optimizer step or evaluation.

    `index` is its place among the step's microbatches: backward passes of one job go in index order.
    `level_slabs` is the pool memory its activations need at each level, ascending: at 0 every layer keeps
    what policy C does, the first half of the others gives one layer more policy B, the second half A, from
    the lowest layer up. `extent` is where they lie once reserved, at `level`. Its first `head_slabs` serve
    the last pass's forward only.
    """

    def __init__(
        self,
        sequence_id: str,
        job_id: str,
        index: int,
        num_tokens: int,
        passes: tuple[TrainingPass, ...],
        *,
        level_slabs: tuple[int, ...],
        head_slabs: int = 0,
        window_tokens: int = 0,
    ) -> None:
        super().__init__(sequence_id, passes[0].adapter)
        self.job_id = job_id
        self.index = index
        self._num_tokens = num_tokens
        self.passes = passes
        self.pass_index = 0
        self.unit_cursor = 0
        self.resting: RestingCall | None = None
        self.level_slabs = level_slabs
        self.level = 0
        self.head_slabs = head_slabs
        self.has_head = True
        self.window_tokens = window_tokens
        self.extent: int | None = None
        self.evictions = 0
        self.reserved_at = 0.0  # the scheduler's time
        self.away_until = 0.0  # likewise; beside requests it stays without memory until then

    @property
    def num_tokens(self) -> int:
        """Tokens of the microbatch."""
        return self._num_tokens

    @property
    def units(self) -> tuple[TrainingUnit, ...]:
        """The units of the pass under way."""
        return self.passes[self.pass_index].units

    @property
    def trains(self) -> bool:
        """The pass under way makes gradients."""
        return self.passes[self.pass_index].trains

    @property
    def forward_done(self) -> bool:
        """The forward of the pass under way is paid."""
        return self.cursor >= self._num_tokens

    @property
    def done(self) -> bool:
        """All passes are paid."""
        return self.unit_cursor == len(self.units) and self.past_last_forward

    @property
    def holds_gradients(self) -> bool:
        """Its units may have added to the job's gradients."""
        return self.trains and self.unit_cursor > 0

    def call_length(self, index: int, most_units: int, most_tokens: int) -> int:
        """How many units from `index` on, at least one, run as one call of at most `most_tokens`. A call that
        rests goes on as it began."""
        if self.resting is not None and index == self.unit_cursor:
            return self.resting.length
        units, tokens = self.units, 0
        last = min(index + most_units, len(units))
        for place in range(index, last):
            unit = units[place]
            tokens += unit.tokens
            if place > index and (not unit.joins or tokens > most_tokens):
                return place - index
        return last - index

    def tokens_of(self, index: int, length: int) -> int:
        """The work in `length` units from `index` on."""
        return sum(unit.tokens for unit in self.units[index : index + length])

    def pay_units(self, length: int) -> None:
        """So many units have run; after a pass's last one the next pass begins."""
        self.resting = None
        self.unit_cursor += length
        if self.unit_cursor == len(self.units) and self.pass_index + 1 < len(self.passes):
            self.pass_index += 1
            self.adapter = self.passes[self.pass_index].adapter
            self.cursor = self.unit_cursor = 0

    @property
    def slabs(self) -> int:
        """Slabs of its extent, had or to be had, at the level in force."""
        return self.level_slabs[self.level] - (0 if self.has_head else self.head_slabs)

    @property
    def past_last_forward(self) -> bool:
        """No token goes forward any more unless its memory is taken away."""
        return self.forward_done and self.pass_index == len(self.passes) - 1

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
        """The latency model's name for unit `index` of the pass under way: a layer goes by its policy."""
        unit = self.units[index]
        return f"layer_{self.policy(unit.height).lower()}" if unit.kind == "layer" else unit.kind

    @property
    def level_in_use(self) -> int:
        """The level in force, less what only layers had whose backward is over."""
        if self.done:
            return 0
        unit = self.units[self.unit_cursor]
        if unit.kind != "layer":
            return self.level
        open_layers = unit.height + 1
        return min(self.level, open_layers + (self.layers if self.level > self.layers else 0))

    def window(self, most: int, affordable: int, *, in_batch: bool = False) -> int:
        """Length of the next forward window: at most `most` tokens, and about as many as are `affordable`.

        A job that set its own width gets it (the caller weighs its cost); others are cut at tile edges, or
        anywhere beside requests, `in_batch` of theirs: no forward's bits depend on where it is cut.
        """
        owed = self.forward_owed
        if self.window_tokens:
            length = min(self.window_tokens, owed, most)
            return length if length == owed or self.window_tokens % TILE else length // TILE * TILE
        if in_batch:
            return min(owed, most, max(affordable, NARROW))
        limit = min(most, max(affordable, TILE))
        if owed <= limit:
            return owed
        to_edge = (self.cursor + limit) // TILE * TILE - self.cursor
        return to_edge if to_edge > 0 else limit

    def restart(self) -> None:
        """Its activations are gone: the pass under way is owed again. What earlier passes scored stays."""
        self.cursor = 0
        self.unit_cursor = 0
        self.resting = None
        self.extent = None
        self.has_head = True
