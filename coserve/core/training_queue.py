"""Whose training goes next: weighted fair queueing over the jobs' measured time.

Each job has a virtual time that its units advance by seconds / weight; the job furthest behind goes first.
A job that was idle comes back at the others' virtual time, so it can't claim what it didn't use.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field

from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.slo import IDLE_WINDOW
from coserve.core.span import SpanKind, TrainingSpan
from coserve.core.training_sequence import TILE, TrainingSequence

EVICTIONS_TO_LOWEST = 2
LEAD = 0.02  # seconds of virtual time that a job may run ahead of one that waits for the next step
MAX_IN_FLIGHT = 2  # microbatches of one job that hold activations: one goes forward, one backward


@dataclass
class JobQueue:
    """A job's microbatches of the current optimizer step, in index order; `weight` from its priority."""

    job_id: str
    weight: float
    virtual_time: float = 0.0
    sequences: list[TrainingSequence] = field(default_factory=list)

    @property
    def in_flight(self) -> list[TrainingSequence]:
        """The first unfinished microbatches, as many as may hold activations."""
        return [s for s in self.sequences if not s.done][:MAX_IN_FLIGHT]

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


class TrainingQueue:
    """The jobs that want device time, and the memory their microbatches hold."""

    def __init__(self, blocks: BlockPool, model: LatencyModel) -> None:
        self._blocks = blocks
        self._model = model
        self._jobs: dict[str, JobQueue] = {}
        self.credit = 0.0
        self._resting: list[TrainingSpan] = []
        self._rested_seconds = 0.0
        self._layer_seconds = 0.0
        self.num_downgrades = 0
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def sequences(self) -> list[TrainingSequence]:
        """All that are queued, of every job."""
        return [s for job in self._jobs.values() for s in job.sequences]

    @property
    def has_work(self) -> bool:
        """Some job owes tokens."""
        return any(not s.done for s in self.sequences)

    def submit(self, job_id: str, sequences: list[TrainingSequence], priority: int = 0) -> None:
        """The microbatches of a job's next optimizer step."""
        job = self._jobs.get(job_id)
        if job is None:
            behind = min((j.virtual_time for j in self._jobs.values()), default=0.0)
            job = self._jobs[job_id] = JobQueue(job_id, 2.0**-priority, behind)
        job.sequences = list(sequences)

    def remove(self, job_id: str) -> None:
        """The job ended or was paused: whatever its microbatches hold is free."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            for sequence in job.sequences:
                self.release(sequence)

    def release(self, sequence: TrainingSequence) -> None:
        """Give a microbatch's activations back."""
        if sequence.extent is not None:
            self._blocks.release_extent(sequence.extent)
            sequence.extent = None

    def release_head(self, sequence: TrainingSequence) -> bool:
        """Give back what only its forward needed, once it is over; False where there is nothing of that."""
        ready = sequence.past_last_forward and sequence.has_head and sequence.head_slabs > 0
        if not ready or sequence.extent is None:
            return False
        sequence.extent = self._blocks.advance_extent(sequence.extent, sequence.head_slabs)
        sequence.has_head = False
        return True

    def charge(self, job_id: str, seconds: float) -> None:
        """Device time that a job's units took."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.virtual_time += seconds / job.weight

    def policies(self) -> dict[str, dict[str, int]]:
        """For each job that holds activations, its layers with a backward in memory by policy."""
        found: dict[str, dict[str, int]] = {}
        for sequence in self.sequences:
            if sequence.extent is not None:
                layers = found.setdefault(sequence.job_id, {"A": 0, "B": 0, "C": 0})
                for height in range(sequence.layers):
                    layers[sequence.policy(height)] += 1
        return found

    def downgrade(self, missing: int) -> list[TrainingSequence]:
        """Take up to `missing` slabs from training for inference by giving up levels of activations, which
        loses no work. What no backward will read goes first, then the newest microbatch's. Returns those that
        keep less now."""
        holders = [s for s in self.sequences if s.extent is not None and not s.done]
        touched: list[TrainingSequence] = []
        for unused_only in (True, False):
            for sequence in reversed(holders):
                freed = self._lower(sequence, sequence.level_in_use if unused_only else 0, missing)
                missing -= freed
                if freed and sequence not in touched:
                    touched.append(sequence)
        self.num_downgrades += len(touched)
        return touched

    def _lower(self, sequence: TrainingSequence, lowest: int, missing: int) -> int:
        """Lower the level until `missing` slabs are free or it is `lowest`; returns how many are."""
        level, before = sequence.level, sequence.level_slabs[sequence.level]
        while level > lowest and before - sequence.level_slabs[level] < missing:
            level -= 1
        freed = before - sequence.level_slabs[level]
        if freed:
            assert sequence.extent is not None
            sequence.level = level
            self._blocks.shrink_extent(sequence.extent, sequence.slabs)
        return freed

    @property
    def resting(self) -> list[TrainingSpan]:
        """Forward windows that stopped between two layers and can go on: they still have their memory, and
        nothing moved them since."""
        there = self.sequences
        for span in self._resting:
            sequence = span.sequence
            if sequence not in there or sequence.extent is None or sequence.cursor != span.start:
                self._resting, self._rested_seconds = [], 0.0
                break
        return self._resting

    def rest(self, spans: list[TrainingSpan], seconds: float, layer_seconds: float) -> None:
        """The forward windows stopped after `seconds`; a layer of them takes `layer_seconds`."""
        self._resting = list(spans)
        self._rested_seconds += seconds
        self._layer_seconds = layer_seconds

    def awake(self) -> float:
        """The windows that ran apart are done: the seconds they took before they last rested."""
        seconds = self._rested_seconds
        self._resting, self._rested_seconds = [], 0.0
        return seconds

    def evict_one(self) -> list[TrainingSequence]:
        """Take activation memory from training for inference (I5). Returns the microbatches that lost theirs.

        Forward work is the cheapest to lose, newest first. A backward pass has already added into its job's
        gradients, so taking its memory restarts the job's whole optimizer step.
        """
        holders = [s for s in self.sequences if s.extent is not None and not s.done]
        for sequence in reversed(holders):
            if not sequence.holds_gradients:
                return [self._evict(sequence)]
        if not holders:
            return []
        job = self._jobs[holders[-1].job_id]
        return [self._evict(s) for s in job.sequences]

    def _evict(self, sequence: TrainingSequence) -> TrainingSequence:
        self.release(sequence)
        sequence.restart()
        sequence.evictions += 1
        self.num_evictions += 1
        return sequence

    def plan(
        self, budget: float, max_tokens: int, kv_headroom: int, *, mixed: bool
    ) -> tuple[list[TrainingSpan], list[TrainingSpan]]:
        """Forward windows and backward units for a step, in the order of fairness.

        `budget` is in seconds, `max_tokens` bounds the forward windows, `kv_headroom` slabs stay free for
        requests. Where a target leaves less than one unit a step, the steps' shares are saved up in `credit`
        until they pay for it, so training keeps moving; a step without inference runs at least one unit. It
        ends early rather than let others run away from a job that has had all it can have of one step.
        Windows that rest go on before anything else begins, beside requests once a layer is paid for.
        """
        resting = self.resting
        if resting:
            cost = self._layer_seconds
            paid = not mixed or cost <= budget or self._afford(cost, budget)
            return (resting if paid else []), []
        forward: dict[str, TrainingSpan] = {}
        backward: dict[str, TrainingSpan] = {}
        spent, tokens = 0.0, max_tokens
        virtual = {job_id: job.virtual_time for job_id, job in self._jobs.items()}
        blocked: set[str] = set()
        furthest = math.inf
        while len(blocked) < len(virtual):
            job = self._jobs[min((j for j in virtual if j not in blocked), key=lambda j: (virtual[j], j))]
            if virtual[job.job_id] > furthest:
                break
            choice = self._next_span(job, forward, backward, tokens, kv_headroom, budget - spent, mixed)
            if choice is None:
                blocked.add(job.job_id)
                if not mixed and virtual[job.job_id] > job.virtual_time:
                    furthest = min(furthest, virtual[job.job_id] + LEAD)
                continue
            span, cost = choice
            if spent + cost > budget and (forward or backward or (mixed and not self._afford(cost, budget))):
                break
            spent += cost
            # While costs are unknown they are 0: one unit of each kind a step until they are learnt.
            virtual[job.job_id] += max(cost, 1e-4) / job.weight
            chosen = forward if span.kind is SpanKind.TRAIN_FORWARD else backward
            key = span.sequence.sequence_id
            if key in chosen:
                before = chosen[key]
                span = TrainingSpan(span.kind, span.sequence, before.start, before.length + span.length)
            chosen[key] = span
            if span.kind is SpanKind.TRAIN_FORWARD:
                tokens = max_tokens - sum(s.length for s in forward.values())
            if cost == 0.0:
                blocked.add(job.job_id)
        return list(forward.values()), list(backward.values())

    def _afford(self, cost: float, budget: float) -> bool:
        """Whether what was saved up pays for a unit that is larger than a step's budget; else save more."""
        self.credit += budget
        if cost > self.credit:
            return False
        self.credit = 0.0
        return True

    def _next_span(
        self,
        job: JobQueue,
        forward: dict[str, TrainingSpan],
        backward: dict[str, TrainingSpan],
        max_tokens: int,
        kv_headroom: int,
        seconds: float,
        mixed: bool,
    ) -> tuple[TrainingSpan, float] | None:
        """The job's next unit and its predicted seconds: a forward window first when none is planned yet
        (so that it rides along with the step's other rows), then backward units."""
        sequence = job.forward_candidate()
        unplanned = sequence is not None and sequence.sequence_id not in forward
        if sequence is not None and unplanned and self._reserve(sequence, kv_headroom):
            length = self._window_length(sequence, max_tokens, seconds, mixed)
            if length:
                span = TrainingSpan(SpanKind.TRAIN_FORWARD, sequence, sequence.cursor, length)
                return span, self._model.predict_unit("forward", length)
        sequence = job.unit_candidate()
        if sequence is not None:
            planned = backward.get(sequence.sequence_id)
            index = sequence.unit_cursor + (planned.length if planned else 0)
            if index < len(sequence.units):
                span = TrainingSpan(SpanKind.TRAIN_BACKWARD, sequence, index, 1)
                kind, tokens = sequence.unit_kind(index), sequence.units[index].tokens
                return span, self._model.predict_unit(kind, tokens)
        return None

    def _window_length(
        self, sequence: TrainingSequence, max_tokens: int, seconds: float, mixed: bool
    ) -> int:
        per_token = self._model.predict_unit("forward", 1)
        affordable = int(seconds / per_token) if per_token > 0.0 else TILE
        if not mixed:
            affordable = max(affordable, IDLE_WINDOW)
        return sequence.window(max_tokens, affordable) if max_tokens > 0 else 0

    def _reserve(self, sequence: TrainingSequence, kv_headroom: int) -> bool:
        """Memory at the highest level that leaves the headroom, and what the others in flight need at least.

        Memory that was taken away once is asked for again only with room to spare (no thrashing), and after
        the second time at the lowest level.
        """
        if sequence.extent is not None:
            return True
        least = sequence.level_slabs[0]
        headroom = kv_headroom * (1 + min(sequence.evictions, 3))
        if self._blocks.num_free < min(least + headroom, self._blocks.num_blocks):
            return False
        most = 0
        if sequence.evictions < EVICTIONS_TO_LOWEST:
            spare = self._blocks.num_free - headroom - self._claims(sequence)
            most = min(spare, self._blocks.longest_run())
        sequence.level = max(0, bisect_right(sequence.level_slabs, most) - 1)
        sequence.extent = self._blocks.reserve_extent(sequence.slabs)
        return sequence.extent is not None

    def _claims(self, besides: TrainingSequence) -> int:
        """Slabs that the other microbatches about to be in flight need at their lowest level."""
        waiting = [s for job in self._jobs.values() for s in job.in_flight if s.extent is None]
        return sum(s.level_slabs[0] for s in waiting if s is not besides)
