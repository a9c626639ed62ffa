"""Every sequence owes tokens; each step spends one token budget on spans.

Inference goes first: running requests, then waiting ones, prompts in chunks. What the latency target leaves
goes to training. All decisions are made here, from plain numbers; time is passed in.
"""

from __future__ import annotations

import itertools
from bisect import bisect, insort
from collections.abc import Callable
from dataclasses import dataclass

from coserve.core.block_pool import BlockPool
from coserve.core.deadlines import tokens_in_time
from coserve.core.fair_shares import FairShares
from coserve.core.latency_model import LatencyModel
from coserve.core.outputs import Outputs
from coserve.core.request import Request, RequestStatus
from coserve.core.request_prefixes import RequestPrefixes
from coserve.core.slo import (
    IDLE_QUANTUM,
    LEAST_PROMPT_TOKENS,
    PACE,
    LatencyTargets,
)
from coserve.core.span import InferenceSpan, SpanKind
from coserve.core.step_demands import Demand, demands_of
from coserve.core.step_plan import StepPlan
from coserve.core.training_budgets import TrainingBudgets
from coserve.core.training_queue import TrainingQueue
from coserve.core.training_sequence import TILE


@dataclass(frozen=True)
class SchedulerLimits:
    """Per-step and per-server limits. `headroom` slabs are kept from training for requests to grow into;
    training's forward can rest between any two of the model's `num_layers`, jobs have at
    least `min_training_share` of the time, whatever the targets."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    headroom: int
    num_layers: int = 1
    min_training_share: float = 0.0


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recompute, and training in what is left.

    `targets` are those of requests that bring none; a step keeps to the tightest of its requests' targets.
    `adapter_ready(digest)` says whether an adapter's rows are on the device and, if so, takes a reference
    for one request; `adapter_released(digest)` gives it back.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        model: LatencyModel,
        targets: LatencyTargets,
        adapter_ready: Callable[[str], bool],
        adapter_released: Callable[[str], None],
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.model = model
        self.targets = targets
        self.training = TrainingQueue(blocks, model, limits.num_layers)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_deferred = 0  # waiting requests whose adapter or grammar wasn't ready in the last step
        self.prefixes = RequestPrefixes(blocks, limits.block_size)
        self.shares = FairShares()
        self.budgets = TrainingBudgets(model, limits.min_training_share)
        self.outputs = Outputs()
        self.left_waiting = False  # the last step had no room for somebody,
        self.out_of_memory = False  # and that for want of blocks
        self.pressed_until = 0.0  # seconds of `now`; requests were refused for their targets
        self._requests: dict[str, Request] = {}
        self._num_with_targets = 0
        self._adapter_ready = adapter_ready
        self._adapter_released = adapter_released

    # ------------------------------------------------------------------ requests in and out

    def ahead_of(self, request: Request) -> list[Request]:
        """Those waiting whose turn comes before that of a request that isn't here yet."""
        place = bisect(self.waiting, request.order, key=_order)
        if self.shares.is_alone(request.tenant):
            return self.waiting[:place]
        waiting = (*self.waiting[:place], request, *self.waiting[place:])
        return list(itertools.takewhile(lambda r: r is not request, self.shares.in_turn(waiting)))

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._requests[request.sequence_id] = request
        self._num_with_targets += request.targets is not None
        self.shares.join(request)
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def get(self, request_id: str) -> Request | None:
        """The request of this id; None when there is none."""
        return self._requests.get(request_id)

    def finish(self, request: Request) -> None:
        """The request ended or was aborted: everything it holds is free at once."""
        if request.finished:
            return
        if request in self.running:
            self.running.remove(request)
            self._leave_device(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self._num_with_targets -= request.targets is not None
        self.shares.leave(request)
        self.outputs.end()
        del self._requests[request.sequence_id]

    @property
    def has_requests(self) -> bool:
        """Somebody waits or runs."""
        return bool(self.running or self.waiting)

    # ------------------------------------------------------------------ one step

    def schedule(self, now: float) -> StepPlan:
        """Plan the next step. Cursors move only in `commit`."""
        plan = StepPlan()
        self.training.now = now
        budget = self._schedule_running(plan, self.limits.max_num_batched_tokens, now)
        if not plan.preempted:
            self._schedule_waiting(plan, budget, now)
        if any(span.kind is SpanKind.PREFILL or span.request.adapter for span in plan.inference):
            plan.inference.sort(key=lambda span: (span.request.adapter or "", span.kind is SpanKind.PREFILL))
        self._schedule_training(plan, now)
        return plan

    def commit(self, plan: StepPlan, now: float) -> None:
        """The plan's inference was run: cursors move, full blocks become known to the prefix cache."""
        for span in plan.inference:
            request = span.request
            if not request.finished:
                if span.samples:
                    targets, count = request.targets or self.targets, request.num_output_tokens
                    request.pace_from = targets.pace(request.pace_from, count, now)
                request.cursor = span.start + span.length
                self.outputs.tokens += span.samples
                self.prefixes.remember(request, span.start)
                if self.shares.contended and span.kind is SpanKind.DECODE:
                    self.shares.charge(request, 1)

    def account(self, seconds: float, training: float, after_answers: float) -> None:
        """A step took `seconds`, `training` of them for jobs, who are owed a part while they have work, and
        `after_answers` since its tokens."""
        self.budgets.account(seconds, training, after_answers, owes=self.training.has_work)

    def _schedule_running(self, plan: StepPlan, budget: int, now: float) -> int:
        """Those that owe one token first; then prompts, as far as the others can wait for them. Returns what
        is left for prompts that wait."""
        prompts, size = False, self.limits.block_size
        in_order = sorted(self.running, key=self.shares.rank) if self.shares.contended else self.running
        decoding: list[Request] = []
        reading: list[Request] = []
        for request in in_order:
            (reading if request.forward_owed > 1 else decoding).append(request)
        for request in (*decoding, *reading):
            owed = request.forward_owed
            if owed > 1 and not prompts:
                prompts, budget = True, min(budget, self._prompt_tokens(plan, now))
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue
            length = owed if owed < budget else budget
            end = request.cursor + length
            if length and (end <= len(request.block_table) * size or self._grow(request, end, plan)):
                budget -= length
                plan.inference.append(self._span(request, length))
        if plan.preempted:
            # A span planned before its request was preempted in favour of an earlier one.
            plan.inference = [s for s in plan.inference if s.request.status is RequestStatus.RUNNING]
        if prompts or not self.waiting:
            return budget
        return min(budget, self._prompt_tokens(plan, now))

    def _prompt_tokens(self, plan: StepPlan, now: float) -> int:
        """Prompt tokens of a step: so many that those who decode in it keep their target, who have waited for
        the training that followed their last token already."""
        return self.prompt_tokens(plan.inference_tokens, plan.context_tokens, now, self.budgets.since_answers)

    def prompt_tokens(self, tokens: int, context: int, now: float, spent: float | None = None) -> int:
        """Prompt tokens beside decoding rows of `tokens` that look at `context` keys; the last answers were
        `spent` seconds ago (None: of any step, of rows that are neither early nor late). No more than the
        model may know the time of. Prompts move in any case where the rows by themselves are too slow for
        their target already; else what the rows leave in the steps to come is enough for that."""
        alone, most = self.model.predict_inference(tokens, context), self.model.most_to_try
        if alone == 0.0:
            return min(most, self.limits.max_num_batched_tokens)
        demands = self.demands(now)
        late = max((d.wait / d.targets.patience for d in demands if d.wait is not None), default=0.0)
        limit = min(
            (
                d.targets.prompt_limit(
                    alone, late * d.targets.patience, None if spent is None else d.early, spent or 0.0
                )
                for d in demands
                if d.decodes
            ),
            default=self.targets.prompt_limit(alone, late * self.targets.patience, None, spent or 0.0),
        )
        least = 0 if self._keeps_pace(alone, demands) else LEAST_PROMPT_TOKENS
        return max(least, min(most, self.model.tokens_within(limit, tokens, context)))

    @staticmethod
    def _keeps_pace(seconds: float, demands: list[Demand]) -> bool:
        """Whether steps of so many seconds leave something of the tightest explicit time per token."""
        tpot = min((d.targets.tpot for d in demands if d.targets.tpot > 0.0), default=0.0)
        return seconds < PACE * tpot

    def _schedule_waiting(self, plan: StepPlan, budget: int, now: float) -> None:
        self.num_deferred, self.left_waiting, self.out_of_memory = 0, False, False
        in_turn = self.shares.in_turn(self.waiting) if self.shares.contended else list(self.waiting)
        for span in plan.inference if in_turn else ():
            budget = min(budget, tokens_in_time(span, plan, self.model, self.targets, now))
        for request in in_turn:
            if budget == 0 or len(self.running) >= self.limits.max_num_seqs:
                self.left_waiting = True
                break
            if request.awaits_grammar or (
                request.adapter is not None and not self._adapter_ready(request.adapter)
            ):
                self.num_deferred += 1
                continue
            if not self._has_turn(request, now):
                self.left_waiting = True
                self._leave_device(request)
                break
            self.prefixes.match(request)
            length = min(request.forward_owed, budget)
            end = request.cursor + length
            if not (self._has_room(request) and self._grow(request, end, plan, admit=True)):
                self._leave_device(request)
                request.cursor, self.left_waiting, self.out_of_memory = 0, True, True
                break
            self.waiting.remove(request)
            insort(self.running, request, key=_order)
            if request.status is RequestStatus.WAITING:
                self._count_admission(request)
            request.status = RequestStatus.RUNNING
            if request.scheduled_at is None:
                request.scheduled_at = now
            span = self._span(request, length)
            plan.inference.append(span)
            budget = min(budget - length, tokens_in_time(span, plan, self.model, self.targets, now))

    def _has_turn(self, request: Request, now: float) -> bool:
        """Whether those that run keep an explicit time per token with one more beside them. Who waits here
        waits for a first token; let in, he would slow down all of them, himself too."""
        if not self.running or not (self.targets.tpot or self._num_with_targets):
            return True
        demands = self.demands(now)
        if all(d.targets.tpot == 0.0 for d in demands):
            return True
        context = sum(r.num_tokens for r in (*self.running, request))
        return self._keeps_pace(self.model.predict_inference(len(self.running) + 1, context), demands)

    def _has_room(self, request: Request) -> bool:
        """Room for all its tokens and a block for each that runs. Who comes in with less soon takes memory
        from others, or gives up its own, and is computed again."""
        missing = self._blocks_for(request.num_tokens) - len(request.block_table) + len(self.running)
        return not self.running or missing <= self.blocks.num_free + self.blocks.num_extent_slabs

    def _count_admission(self, request: Request) -> None:
        """A request begins; one that was preempted does not begin again, and pays for its prompt once."""
        self.prefixes.count(request)
        if self.shares.contended:
            self.shares.charge(request, request.forward_owed)

    def _schedule_training(self, plan: StepPlan, now: float) -> None:
        tokens, beside = plan.inference_tokens, None
        if plan.inference:
            plan.inference_alone = plan.predicted = self.model.predict_inference(tokens, plan.context_tokens)
            owed = sum(r.forward_owed for r in self.running) - tokens
            probes = self.budgets.probes(plan)
            if not self.model.trained or not self.training.has_work or (probes and not plan.in_order):
                return
            retreats = self.left_waiting or bool(plan.preempted) or now < self.pressed_until
            beside = self.budgets.allot(plan, self.demands(now), max(0, owed), retreats=retreats)
        elif self.waiting and not self.training.has_work:
            return
        else:
            plan.training_budget = IDLE_QUANTUM
        rows = 0 if plan.in_order else max(self.limits.max_num_batched_tokens - tokens, TILE)
        share = self.training.plan(plan.training_budget, rows, self.limits.headroom, beside)
        plan.training_forward, plan.apart = list(share.forward.values()), share.apart
        plan.training_backward = list(share.backward.values())
        plan.training_budget = max(share.budget, share.spent)
        if plan.window_rows:
            plan.predicted += max(0.0, share.window_seconds - plan.concealed)

    def demands(self, now: float) -> list[Demand]:
        """What the requests ask of a step: one demand for each set of targets among them."""
        return demands_of(self.running, self.waiting, self.targets, self._num_with_targets > 0, now)

    @staticmethod
    def _span(request: Request, length: int) -> InferenceSpan:
        samples = request.cursor + length == request.num_tokens
        decode = samples and length == 1 and request.num_output_tokens > 0
        kind = SpanKind.DECODE if decode else SpanKind.PREFILL
        return InferenceSpan(kind, request, request.cursor, length, samples)

    # ------------------------------------------------------------------ blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _grow(self, request: Request, num_tokens: int, plan: StepPlan, *, admit: bool = False) -> bool:
        """Blocks for `num_tokens`; takes them from training first (levels of activations, then whole
        microbatches), then (not to admit someone) from the request that is last in order. False when the
        request itself had to go."""
        missing = self._blocks_for(num_tokens) - len(request.block_table)
        while missing > 0:
            blocks = self.blocks.allocate(missing)
            if blocks is not None:
                request.block_table.extend(blocks)
                return True
            downgraded = self.training.downgrade(missing - self.blocks.num_free)
            if downgraded:
                plan.downgraded.extend(downgraded)
                continue
            evicted = self.training.evict_one()
            if evicted:
                plan.evicted.extend(evicted)
                continue
            if admit:
                return False
            victim = max(self.running, key=self.shares.rank if self.shares.contended else _order)
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        self.running.remove(request)
        self._leave_device(request)
        request.preempt()
        self.num_preemptions += 1
        plan.preempted.append(request)
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.order)

    def _leave_device(self, request: Request) -> None:
        self.blocks.release(request.block_table)
        request.block_table = []
        if request.adapter is not None:
            self._adapter_released(request.adapter)


def _order(request: Request) -> tuple[int, float, str]:
    return request.order
