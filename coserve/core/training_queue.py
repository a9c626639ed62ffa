"""Whose training goes next: weighted fair queueing over the jobs' measured time, and how much at once.

Each job has a virtual time that its units advance by seconds / weight; the job furthest behind goes first.
A job that was idle comes back at the others' virtual time, so it can't claim what it didn't use.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter

from coserve.core.block_pool import BlockPool
from coserve.core.job_queue import JobQueue
from coserve.core.latency_model import LatencyModel
from coserve.core.slo import UNIT_SECONDS, WIDEST, WIDEST_ON_GPU
from coserve.core.span import SpanKind, TrainingSpan
from coserve.core.training_plan import Beside, TrainingPlan
from coserve.core.training_sequence import NARROW, TILE, TrainingSequence

CACHE_FLOOR = 8  # one slab in so many stays the prefix cache's, but for what training needs at the least
EVICTIONS_TO_LOWEST = 2
EVICTIONS_TO_WAIT = 5
LEAST_AWAY, MOST_AWAY = 0.05, 60.0  # seconds
LEAD = 0.02  # seconds of virtual time that a job may run ahead of one that waits for the next step


class TrainingQueue:
    """The jobs that want device time, and the memory their microbatches hold. A forward window can rest
    between any two of the model's `num_layers`."""

    def __init__(self, blocks: BlockPool, model: LatencyModel, num_layers: int = 1) -> None:
        self._blocks = blocks
        self._model = model
        self._num_layers = num_layers
        self._widest = WIDEST_ON_GPU if model.overlaps else WIDEST
        self._jobs: dict[str, JobQueue] = {}
        self.credit = 0.0
        self._resting: list[TrainingSpan] = []
        self._rested_seconds = 0.0
        self._layer_seconds = 0.0
        self.now = 0.0  # the scheduler's time of the step that is planned
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
        """Some job owes tokens, or an update."""
        return any(job.owes_update or any(not s.done for s in job.sequences) for job in self._jobs.values())

    def owe_update(self, job_id: str, owes: bool) -> None:
        """All units of a job's optimizer step have run, but what comes of them has not, or has now."""
        if job_id in self._jobs:
            self._jobs[job_id].owes_update = owes

    def submit(
        self,
        job_id: str,
        sequences: list[TrainingSequence],
        priority: int = 0,
        tenant: str = "",
        share: float = 1.0,
    ) -> None:
        """The microbatches of a job's next optimizer step. All jobs of `tenant` together have the weight
        `share` beside those of other tenants."""
        job = self._jobs.get(job_id)
        if job is None:
            behind = min((j.virtual_time for j in self._jobs.values()), default=0.0)
            job = JobQueue(job_id, 2.0**-priority, tenant, share, virtual_time=behind)
            self._jobs[job_id] = job
            self._share_out()
        job.sequences = list(sequences)

    def _share_out(self) -> None:
        jobs = self._jobs.values()
        counts = Counter(job.tenant for job in jobs)
        for job in jobs:
            part = job.share / counts[job.tenant] if len(counts) > 1 else 1.0
            job.weight = job.own_weight * part

    def remove(self, job_id: str) -> None:
        """The job ended or was paused: whatever its microbatches hold is free."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._share_out()
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
        gradients, so taking its memory restarts the job's optimizer step: the whole of it once, and from then
        on, as the job keeps what its gradients were after each microbatch, what isn't done of it.
        """
        holders = [s for s in self.sequences if s.extent is not None and not s.done]
        for sequence in reversed(holders):
            if not sequence.holds_gradients:
                return [self._evict(sequence)]
        if not holders:
            return []
        job = self._jobs[holders[-1].job_id]
        lost = [s for s in job.sequences if not (job.keeps_gradients and s.done)]
        job.keeps_gradients = True
        return [self._evict(s) for s in lost]

    def keeps_gradients(self, job_id: str) -> bool:
        """Whether the job's gradients are to be kept after each of its microbatches."""
        return job_id in self._jobs and self._jobs[job_id].keeps_gradients

    def _evict(self, sequence: TrainingSequence) -> TrainingSequence:
        had = self.now - sequence.reserved_at if sequence.extent is not None else 0.0
        self.release(sequence)
        sequence.restart()
        sequence.evictions += 1
        doublings = sequence.evictions - EVICTIONS_TO_WAIT
        if doublings >= 0:
            sequence.away_until = self.now + min(max(had, LEAST_AWAY) * 2.0**doublings, MOST_AWAY)
        self.num_evictions += 1
        return sequence

    def plan(
        self, budget: float, max_tokens: int, kv_headroom: int, beside: Beside | None = None
    ) -> TrainingPlan:
        """Forward windows and backward units for a step, in the order of fairness.

        `budget` is in seconds; `max_tokens` bounds the forward windows, `kv_headroom` slabs stay free for
        requests, and those of the step, if any, are `beside` it. What steps beside
        requests leave of their budgets is saved up in `credit`, as much as one unit costs, and pays for a
        step's last unit (where requests are `paced`, which saves their time for later steps already, for its
        only one), so training keeps moving where a target leaves less than one. A step without inference runs
        at least one unit. It ends early rather than let others run away from a job that has had all it can
        have of one step. Windows that rest go on before anything else begins, beside requests once a layer is
        paid for.
        """
        plan = TrainingPlan(budget, beside)
        if plan.mixed and budget <= 0.0:
            return plan
        refused = self._layer_seconds
        if not self.resting:
            refused = self._fill(plan, max_tokens, kv_headroom)
        elif self._pays(plan, self._layer_seconds):
            plan.apart = True
            plan.forward = {span.sequence.sequence_id: span for span in self.resting}
            plan.spent = self._layers_within(plan, self._layer_seconds)
        if plan.mixed:
            self.credit = max(0.0, min(self.credit + plan.left, max(UNIT_SECONDS, refused)))
        return plan

    def _fill(self, plan: TrainingPlan, max_tokens: int, kv_headroom: int) -> float:
        """Plan what the budget and the credit pay for; returns the cost of the first span that they don't, 0
        where there is no other."""
        virtual = {job_id: job.virtual_time for job_id, job in self._jobs.items()}
        blocked: set[str] = set()
        furthest = math.inf
        while len(blocked) < len(virtual) and not (plan.mixed and (plan.apart or plan.left < 0.0)):
            job = self._jobs[min((j for j in virtual if j not in blocked), key=lambda j: (virtual[j], j))]
            if virtual[job.job_id] > furthest:
                break
            choice = self._next_span(job, plan, max_tokens, kv_headroom)
            if choice is None:
                blocked.add(job.job_id)
                if virtual[job.job_id] > job.virtual_time:
                    furthest = min(furthest, virtual[job.job_id] + LEAD)
                continue
            span, cost, apart = choice
            if not self._pays(plan, cost):
                return cost if cost < math.inf else 0.0
            plan.add(span, self._layers_within(plan, cost) if apart and plan.mixed else cost)
            plan.apart = plan.apart or apart
            # While costs are unknown they are 0: one unit of each kind a step until they are learnt.
            virtual[job.job_id] += max(cost, 1e-4) / job.weight
            if cost == 0.0:
                blocked.add(job.job_id)
        return 0.0

    def _pays(self, plan: TrainingPlan, cost: float) -> bool:
        """Whether the step can have a span of this cost."""
        if not plan.mixed:
            return plan.empty or cost <= plan.left
        return cost <= plan.left + (self.credit if plan.empty or not plan.paced else 0.0)

    def _layers_within(self, plan: TrainingPlan, layer_seconds: float) -> float:
        """What the layers that run in the seconds left take, and one more where what was saved up pays for
        it; one runs in any case."""
        if not layer_seconds:
            return 0.0
        saved = 0.0 if plan.paced else self.credit
        paid = min(int(plan.left / layer_seconds) + 1, int((plan.left + saved) / layer_seconds))
        return layer_seconds * max(1, paid)

    def _next_span(
        self, job: JobQueue, plan: TrainingPlan, max_tokens: int, kv_headroom: int
    ) -> tuple[TrainingSpan, float, bool] | None:
        """The job's next span, its predicted seconds (of a window apart beside requests those of a layer) and
        whether it is a window apart: a forward window first when none is planned yet, then units. A window
        that nothing is left for ends the step's plan, unless the job has units: others would run away."""
        sequence = job.forward_candidate()
        unplanned = sequence is not None and sequence.sequence_id not in plan.forward
        window = None
        if sequence is not None and unplanned and self._reserve(sequence, kv_headroom, plan.mixed):
            window = self._next_window(sequence, plan, max_tokens - plan.forward_tokens)
            if window is not None and (plan.empty or window[1] <= plan.left):
                return window
        sequence = job.unit_candidate()
        if sequence is not None:
            planned = plan.backward.get(sequence.sequence_id)
            index = sequence.unit_cursor + (planned.length if planned else 0)
            if index < len(sequence.units):
                seconds = plan.left if plan.mixed else None
                length = self.call_length(sequence, index, len(sequence.units), seconds)
                span = TrainingSpan(SpanKind.TRAIN_BACKWARD, sequence, index, length)
                cost = self.call_seconds(sequence, index, length)
                if plan.mixed and sequence.resting is not None and planned is None:
                    cost = min(cost, max(plan.left, sequence.resting.piece))
                return span, cost, False
        return window

    def _next_window(
        self, sequence: TrainingSequence, plan: TrainingPlan, max_tokens: int
    ) -> tuple[TrainingSpan, float, bool] | None:
        """With requests a window goes in their batch as far as the budget pays for it or the device conceals
        it, else apart; without, all windows are one batch apart, no wider than one call. None where no window
        can be had now. One that the next step's batch could have, if training left it this one's time, can't
        be paid for until then."""
        if max_tokens <= 0:
            return None
        model, layers = self._model, self._num_layers
        if plan.beside is not None:
            window = self._window_in_batch(sequence, plan, plan.beside, max_tokens)
            if window is not None:
                return window
        if plan.mixed:
            affordable = model.unit_tokens_within("apart", min(UNIT_SECONDS, plan.left) * layers)
            widest = max(TILE, min(affordable, self._widest))
        else:
            widest = self._idle_tokens("apart", layers)
        if plan.forward_tokens >= widest:
            return None
        length = sequence.window(max_tokens, widest - plan.forward_tokens)
        cost = model.predict_unit("apart", length) / (layers if plan.mixed else 1)
        span = TrainingSpan(SpanKind.TRAIN_FORWARD, sequence, sequence.cursor, length)
        return (span, cost, True) if length else None

    def _window_in_batch(
        self, sequence: TrainingSequence, plan: TrainingPlan, beside: Beside, max_tokens: int
    ) -> tuple[TrainingSpan, float, bool] | None:
        """A window in the requests' batch; None where it has to run apart."""
        model, tokens, context = self._model, beside.tokens + plan.forward_tokens, beside.context
        if model.overlaps:
            left = plan.left
        elif beside.in_batch is not None:
            left = min(plan.left, beside.in_batch - plan.window_seconds)
        else:
            return None
        rows = model.window_rows_within(left, tokens, context)
        length = sequence.window(max_tokens, rows, in_batch=not model.overlaps)
        if not length:
            return None
        cost = model.window_seconds(length, tokens, context)
        if cost > left and not model.overlaps:
            if plan.empty and model.window_seconds(NARROW, beside.tokens, context) > plan.budget:
                return None
            cost = math.inf
        return TrainingSpan(SpanKind.TRAIN_FORWARD, sequence, sequence.cursor, length), cost, False

    def call_length(self, sequence: TrainingSequence, index: int, most: int, seconds: float | None) -> int:
        """How many units from `index` on, `most` at most and one at least, run as one call of no more tokens
        than its kind may have: beside requests what takes `seconds`, without (None) what an arrival waits
        for."""
        kind = sequence.unit_kind(index)
        tokens = self._idle_tokens(kind) if seconds is None else self._model.unit_tokens_within(kind, seconds)
        return sequence.call_length(index, most, min(tokens, self._most_tokens(kind)))

    def _idle_tokens(self, kind: str, layers: int = 1) -> int:
        """What an arrival can wait for, but no less than a tile, nor than what wastes little."""
        most = self._most_tokens(kind)
        return max(TILE, self._model.unhurried_unit_tokens(kind, UNIT_SECONDS * layers, most))

    def _most_tokens(self, kind: str) -> int:
        """Of one call; the head's have logits, of which many rows would be much memory."""
        return WIDEST if kind in ("score", "loss") else self._widest

    def call_seconds(self, sequence: TrainingSequence, index: int, length: int) -> float:
        """How long so many units from `index` on should take as one call; 0 while unknown. Of a call that
        rests, what is left of it: a piece at least."""
        tokens = sequence.tokens_of(index, length)
        seconds = self._model.predict_unit(sequence.unit_kind(index), tokens)
        rests = sequence.resting if index == sequence.unit_cursor else None
        return seconds if rests is None else max(seconds - rests.seconds, rests.piece)

    def _reserve(self, sequence: TrainingSequence, kv_headroom: int, mixed: bool) -> bool:
        """Memory at the highest level that leaves the headroom, what the others in flight need at least, and
        the prefix cache its floor.

        Against thrashing memory that was taken away once is asked for again only with room to spare, after
        the second time at the lowest level, and from the fifth on, beside requests, not before as long as it
        was had the last time, twice that, four times ...
        """
        if sequence.extent is not None:
            return True
        least = sequence.level_slabs[0]
        headroom = kv_headroom * (1 + min(sequence.evictions, 3))
        if self._blocks.num_free < min(least + headroom, self._blocks.num_blocks):
            return False
        if mixed and self.now < sequence.away_until:
            return False
        most = 0
        if sequence.evictions < EVICTIONS_TO_LOWEST:
            cached = min(self._blocks.num_idle, self._blocks.num_blocks // CACHE_FLOOR)
            spare = self._blocks.num_free - headroom - cached - self._claims(sequence)
            most = min(spare, self._blocks.longest_run())
        sequence.level = max(0, bisect_right(sequence.level_slabs, most) - 1)
        sequence.extent, sequence.reserved_at = self._blocks.reserve_extent(sequence.slabs), self.now
        return sequence.extent is not None

    def _claims(self, besides: TrainingSequence) -> int:
        """Slabs that the other microbatches about to be in flight need at their lowest level."""
        waiting = [s for job in self._jobs.values() for s in job.in_flight if s.extent is None]
        return sum(s.level_slabs[0] for s in waiting if s is not besides)
