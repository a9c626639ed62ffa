"""One job's place among those that train: its microbatches, what it has had, and what it may have."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from coserve.core.training_sequence import TrainingSequence

MAX_IN_FLIGHT = 2  # microbatches of one job that hold activations: one goes forward, one backward


@dataclass
class JobQueue:
    """A job's microbatches of the current optimizer step, in index order. `weight` is its `own_weight`, from
    its priority, and its part of its tenant's `share`."""

    job_id: str
    own_weight: float
    tenant: str = ""
    share: float = 1.0
    weight: float = 1.0
    virtual_time: float = 0.0
    keeps_gradients: bool = False  # after each microbatch, since a step was lost to requests
    owes_update: bool = False
    sequences: list[TrainingSequence] = field(default_factory=list)

    @property
    def in_flight(self) -> list[TrainingSequence]:
        """The first unfinished microbatches, as many as may hold activations: one where memory was taken from
        them, so that what comes free serves the one that is done first."""
        first = list(itertools.islice((s for s in self.sequences if not s.done), MAX_IN_FLIGHT))
        return first[:1] if any(s.evictions for s in first) else first

    def unit_candidate(self) -> TrainingSequence | None:
        """The first microbatch in flight with a unit to run. Gradients are added in index order, so only the
        first of all may go backward; scores may be taken ahead."""
        for place, sequence in enumerate(self.in_flight):
            if sequence.forward_done and (place == 0 or not sequence.trains):
                return sequence
        return None

    def forward_candidate(self) -> TrainingSequence | None:
        """The next microbatch with forward tokens to pay, within the limit in flight."""
        return next((s for s in self.in_flight if not s.forward_done), None)
