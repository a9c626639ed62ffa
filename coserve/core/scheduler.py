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
from coserve.core.prefix_cache import block_key, root_key
from coserve.core.request import Request, RequestStatus
from coserve.core.slo import (
    IDLE_QUANTUM,
    LEAST_PROMPT_TOKENS,
    PACE,
    PROBE_EVERY,
    BudgetControl,
    LatencyTargets,
    MinimumShare,
)
from coserve.core.span import InferenceSpan, SpanKind
from coserve.core.step_demands import Demand, demands_of
from coserve.core.step_plan import StepPlan
from coserve.core.training_queue import Beside, TrainingQueue
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
        self.num_deferred = 0  # waiting requests whose adapter wasn't on the device in the last step
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.shares = FairShares()
        self.control = BudgetControl()
        self._since_answers = 0.0  # seconds of the last step that training had
        self.minimum = MinimumShare(limits.min_training_share)
        self.outputs = Outputs()
        self.left_waiting = False  # the last step had no room for somebody,
        self.out_of_memory = False  # and that for want of blocks
        self.pressed_until = 0.0  # seconds of `now`; requests were refused for their targets
        self._requests: dict[str, Request] = {}
        self._num_with_targets = 0
        self._adapter_ready = adapter_ready
        self._adapter_released = adapter_released
        self._seen = 0  # steps without training's rows that the model had learnt from,
        self._unprobed = 0  # and the steps with inference since then

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
        size = self.limits.block_size
        for span in plan.inference:
            request = span.request
            if not request.finished:
                if span.samples:
                    targets, count = request.targets or self.targets, request.num_output_tokens
                    request.pace_from = targets.pace(request.pace_from, count, now)
                request.cursor = end = span.start + span.length
                self.outputs.tokens += span.samples
                if end // size > span.start // size:
                    self._remember_blocks(request, span.start)
                if self.shares.contended and span.kind is SpanKind.DECODE:
                    self.shares.charge(request, 1)

    def account(self, seconds: float, training: float, after_answers: float) -> None:
        """A step took `seconds`, `training` of them for jobs, who are owed a part while they have work, and
        `after_answers` since its tokens."""
        self._since_answers = after_answers if training else 0.0
        if self.training.has_work:
            self.minimum.account(seconds, training)

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
        return self.prompt_tokens(plan.inference_tokens, plan.context_tokens, now, self._since_answers)

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
            if request.adapter is not None and not self._adapter_ready(request.adapter):
                self.num_deferred += 1
                continue
            if not self._has_turn(request, now):
                self.left_waiting = True
                self._leave_device(request)
                break
            self._match_prefix(request)
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
        if not self.running:
            return True
        demands = self.demands(now)
        context = sum(r.num_tokens for r in (*self.running, request))
        seconds = self.model.predict_inference(len(self.running) + 1, context)
        return all(d.targets.tpot == 0.0 for d in demands) or self._keeps_pace(seconds, demands)

    def _has_room(self, request: Request) -> bool:
        """Room for all its tokens and a block for each that runs. Who comes in with less soon takes memory
        from others, or gives up its own, and is computed again."""
        missing = self._blocks_for(request.num_tokens) - len(request.block_table) + len(self.running)
        return not self.running or missing <= self.blocks.num_free + self.blocks.num_extent_slabs

    def _count_admission(self, request: Request) -> None:
        """A request begins; one that was preempted does not begin again, and pays for its prompt once."""
        if self.blocks.cache is not None:
            request.num_cached_tokens = request.cursor
            self.prefix_queries += request.num_tokens
            self.prefix_hits += request.cursor
        if self.shares.contended:
            self.shares.charge(request, request.forward_owed)

    def _schedule_training(self, plan: StepPlan, now: float) -> None:
        tokens, beside = plan.inference_tokens, None
        if plan.inference:
            context = plan.context_tokens
            alone = self.model.predict_inference(tokens, context)
            plan.inference_alone = plan.predicted = alone
            probing = self._probes(plan)
            plan.in_order = probing and self.model.overlaps
            if not self.model.trained or not self.training.has_work or (probing and not plan.in_order):
                return
            demands = self.demands(now)
            retreats = self.left_waiting or plan.preempted
            wanted = 0.0 if retreats else self.training_budget(plan, demands, now)
            if self.model.overlaps:  # most of it runs beside the forward, whose answers wait for it
                wanted = min(wanted, self._before_answers(alone, wanted, demands))
            plan.concealed = 0.0 if plan.in_order else self.model.idle_seconds(tokens, context)
            exposed = max(self.control.allow(wanted), self.minimum.budget(alone))
            plan.training_budget = exposed + plan.concealed
            beside = self._beside(plan, demands)
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

    def _probes(self, plan: StepPlan) -> bool:
        """Whether this step with inference goes without training, or with it in order, for the model to see
        one alone. Where large parts of prompts always had company nothing would show what such a step takes.
        """
        rare = self.model.overlaps and plan.inference_tokens > 2 * len(plan.inference)
        self._unprobed += PROBE_EVERY // 4 if rare else 1
        probes = self._unprobed >= PROBE_EVERY
        if probes or (self._seen != self.model.observations and not self.model.overlaps):
            self._unprobed = 0
        self._seen = self.model.observations
        return probes

    def training_budget(self, plan: StepPlan, demands: list[Demand], now: float) -> float:
        """Seconds of training that every request's target leaves in a step with this inference.

        None after somebody was refused for a target: places come free sooner without. Nor while a prompt
        isn't through that has no explicit time per token to wait for beside it.
        """
        if now < self.pressed_until:
            return 0.0
        alone, guard = plan.inference_alone, self.model.guard
        sampling = [span for span in plan.inference if span.samples]
        context = sum(span.start + span.length + 1 for span in sampling)
        owed = max(0, sum(r.forward_owed for r in self.running) - plan.inference_tokens)
        following = self.model.predict_inference(len(sampling) + owed, context + owed)
        least = self.model.predict_inference(1, 1)
        budgets = (
            0.0
            if owed and d.targets.tpot == 0.0
            else d.targets.training_budget(alone, following, guard, d.wait, d.early, least)
            for d in demands
        )
        return min(budgets)

    def _beside(self, plan: StepPlan, demands: list[Demand]) -> Beside:
        """What training meets in this step. Windows may lengthen the requests' own batch, whose tokens wait
        for it after the training since the last ones, but not beside a prompt: its rows leave the arithmetic
        no time to spare."""
        alone, budget, in_batch = plan.inference_alone, plan.training_budget, None
        if plan.inference_tokens == len(plan.inference):
            in_batch = max(self._before_answers(alone, budget, demands), self.minimum.budget(alone))
        paced = any(demand.early is not None for demand in demands)
        return Beside(plan.inference_tokens, plan.context_tokens, in_batch, paced)

    def _before_answers(self, alone: float, budget: float, demands: list[Demand]) -> float:
        """Seconds of a training budget that this step's answers may wait for."""
        spent = self._since_answers
        return max(0.0, min(d.targets.batch_budget(alone, budget, d.early, spent) for d in demands))

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

    # ------------------------------------------------------------------ prefix cache

    def _match_prefix(self, request: Request) -> None:
        """Share the longest cached run of full blocks, leaving at least one token to compute."""
        cache = self.blocks.cache
        if cache is None or request.sampling.prompt_logprobs is not None:
            return
        size = self.limits.block_size
        limit = (request.num_tokens - 1) // size
        for index in range(limit):
            block = cache.lookup(self._key(request, index))
            if block is None:
                break
            self.blocks.share(block)
            request.block_table.append(block)
        request.cursor = len(request.block_table) * size

    def cached_tokens(self, request: Request) -> int:
        """Tokens of a request that the prefix cache holds now; nothing is shared yet."""
        cache, size = self.blocks.cache, self.limits.block_size
        if cache is None or request.sampling.prompt_logprobs is not None:
            return 0
        count = 0
        for index in range((request.num_tokens - 1) // size):
            if cache.lookup(self._key(request, index)) is None:
                break
            count += size
        return count

    def _remember_blocks(self, request: Request, start: int) -> None:
        """Blocks that became full with the tokens from `start` on."""
        cache = self.blocks.cache
        if cache is None:
            return
        size = self.limits.block_size
        for index in range(start // size, request.cursor // size):
            block = request.block_table[index]
            if not cache.holds(block):
                cache.insert(self._key(request, index), block)

    def _key(self, request: Request, index: int) -> bytes:
        """Key of the request's block `index`, extending the request's chain as needed."""
        hashes, size = request.block_hashes, self.limits.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else root_key(request.adapter)
            hashes.append(block_key(parent, request.token_ids[start : start + size]))
        return hashes[index]


def _order(request: Request) -> tuple[int, float, str]:
    return request.order
