"""Training's part of a step, and the requests that it meets there."""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve.core.span import SpanKind, TrainingSpan


@dataclass(frozen=True)
class Beside:
    """The requests of a step: rows and keys of their batch, the seconds by which windows may lengthen it
    (None: they may not), and whether a pace of theirs saves time for later steps."""

    tokens: int
    context: int
    in_batch: float | None = None
    paced: bool = False


@dataclass
class TrainingPlan:
    """Training's part of a step of `budget` seconds: forward windows, `apart` or in the batch of the requests
    `beside` it, and backward units, by sequence. `spent` is what they should take, `window_seconds` the
    windows of it."""

    budget: float
    beside: Beside | None = None
    forward: dict[str, TrainingSpan] = field(default_factory=dict)
    backward: dict[str, TrainingSpan] = field(default_factory=dict)
    apart: bool = False
    spent: float = 0.0
    window_seconds: float = 0.0

    @property
    def mixed(self) -> bool:
        """There are requests in the step."""
        return self.beside is not None

    @property
    def paced(self) -> bool:
        """And a pace of theirs saves time for later steps."""
        return self.beside is not None and self.beside.paced

    @property
    def left(self) -> float:
        """Seconds."""
        return self.budget - self.spent

    @property
    def empty(self) -> bool:
        """Nothing was planned yet."""
        return not (self.forward or self.backward)

    @property
    def forward_tokens(self) -> int:
        """Of all windows."""
        return sum(span.length for span in self.forward.values())

    def add(self, span: TrainingSpan, cost: float) -> None:
        """Plan a window, or units that go on where those of the same sequence end."""
        chosen = self.forward if span.kind is SpanKind.TRAIN_FORWARD else self.backward
        before = chosen.get(span.sequence.sequence_id)
        if before is not None:
            span = TrainingSpan(span.kind, span.sequence, before.start, before.length + span.length)
        chosen[span.sequence.sequence_id] = span
        self.spent += cost
        self.window_seconds += cost if span.kind is SpanKind.TRAIN_FORWARD else 0.0
