"""`Engine.step` without a device: coserve/core as it is, under a clock of its own.

The order is the engine's: schedule, forward with calls beside, answer, training's windows apart, backward
units until the deadline. `Costs` says how long each takes; nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from coserve.core.block_pool import BlockPool
from coserve.core.calls_beside import CallBeside, calls_beside
from coserve.core.latency_model import LatencyModel
from coserve.core.request import Request
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.core.step_plan import StepPlan
from coserve.core.training_sequence import TrainingSequence

TOKEN = 7  # what every request samples
REST = 1e-12  # seconds of a window that count as nothing left


class Costs(Protocol):
    """Seconds of a step's parts. `overhead` comes with every forward, which ends no sooner than each of the
    calls beside it, `calls_beside` at most, took its `launch`; a window that runs apart is `layers` equal
    pieces."""

    layers: int
    overhead: float
    launch: float
    calls_beside: int

    def forward(
        self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]
    ) -> tuple[float, float]:
        """One batch of both: its seconds, and those in which other arithmetic can run."""
        ...

    def unit(self, kind: str, tokens: int, context: int) -> float:
        """A training unit by the latency model's name for it, its window after `context` keys."""
        ...


class SimulatedEngine:
    """Core's scheduler and a clock, `now`. Of the last step: when it `began`, when its tokens were `answered`
    and the requests that have `sampled` one. `training_seconds` is the work of all units, `noise` draws the
    factor by which a step's times vary."""

    def __init__(
        self,
        costs: Costs,
        limits: SchedulerLimits,
        pool: BlockPool,
        targets: LatencyTargets,
        adapter_ready: Callable[[str], bool],
        adapter_released: Callable[[str], object],
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.costs = costs
        self.pool = pool
        self.model = LatencyModel(overlaps=costs.calls_beside > 0)
        self.scheduler = Scheduler(limits, pool, self.model, targets, adapter_ready, adapter_released)
        self.now = self.began = self.answered = 0.0
        self.sampled: list[Request] = []
        self.training_seconds = 0.0
        self._noise = noise
        self._exposed = 0.0  # seconds of the last step that training made it longer
        self._left = 0.0  # seconds that resting windows still owe

    def step(self, next_arrival: float = math.inf) -> StepPlan:
        """One step; a plan without spans takes no time. Training alone ends early at `next_arrival`."""
        plan = self.scheduler.schedule(self.now)
        self.began = self.answered = self.now
        self.sampled = []
        if plan.empty:
            return plan
        noise, self._exposed = self._noise(), 0.0
        windows = [] if plan.apart else plan.training_forward
        ran, beside = 0, 0.0
        if plan.inference:
            calls = calls_beside(plan, self.scheduler.training, self.model, self.costs.calls_beside)
            forward, idle = self.costs.forward(plan.inference, windows)
            self.now += self.costs.overhead + max(noise * forward, self.costs.launch * len(calls))
            self.answered = self.now
            self._answer(plan)
            ran, beside = sum(call.length for call in calls), sum(call.seconds for call in calls)
            self._join(calls, noise, noise * idle)
            both = self.now - self.began
            rows, tokens, context = plan.window_rows, plan.inference_tokens, plan.context_tokens
            work = self.model.observe_step(tokens, context, rows, beside, both)
            if rows:
                self._exposed += max(0.0, self.answered - self.began - plan.inference_alone)
                self._pay_forward(plan, work)
        deadline = self.began + plan.end
        if plan.apart:
            self._forward_apart(plan, noise, deadline if plan.inference else next_arrival)
        self._backward(plan, noise, deadline, math.inf if plan.inference else next_arrival, ran)
        self.scheduler.account(self.now - self.began, self._exposed, self.now - self.answered)
        return plan

    def _answer(self, plan: StepPlan) -> None:
        self.scheduler.commit(plan, self.now)
        self.sampled = [s.request for s in plan.inference if s.samples and not s.request.finished]
        for request in self.sampled:
            if request.append(TOKEN) is not None:
                self.scheduler.finish(request)

    def _charge_forward(self, plan: StepPlan, seconds: float) -> int:
        rows = sum(span.length for span in plan.training_forward)
        self.training_seconds += seconds
        for span in plan.training_forward:
            self.scheduler.training.charge(span.sequence.job_id, seconds * span.length / rows)
        return rows

    def _pay_forward(self, plan: StepPlan, seconds: float, earlier: float = 0.0) -> None:
        rows = self._charge_forward(plan, seconds)
        if plan.apart:
            self.model.observe_unit("apart", rows, seconds + earlier)
        for span in plan.training_forward:
            span.sequence.cursor += span.length
            self.scheduler.training.release_head(span.sequence)

    def _join(self, calls: Sequence[CallBeside], noise: float, idle: float) -> None:
        """Calls that ran beside the forward, `idle` seconds of them in what its arithmetic left."""
        seconds = 0.0
        for call in calls:
            took = noise * self._unit_seconds(call.sequence, call.kind, call.tokens)
            self.training_seconds += took
            seconds += took
            self._pay(call.sequence, call.length, call.seconds)
        late = max(0.0, seconds - idle)
        self.now += late
        self._exposed += late

    def _unit_seconds(self, sequence: TrainingSequence, kind: str, tokens: int) -> float:
        return self.costs.unit(kind, tokens, max(0, sequence.num_tokens - tokens) // 2)

    def _pay(self, sequence: TrainingSequence, length: int, seconds: float) -> None:
        queue = self.scheduler.training
        queue.charge(sequence.job_id, seconds)
        sequence.pay_units(length)
        if sequence.done:
            queue.release(sequence)

    def _forward_apart(self, plan: StepPlan, noise: float, stop: float) -> None:
        """Layer by layer until `stop`, beside requests while the next one ends by then; rests there."""
        queue = self.scheduler.training
        whole = noise * self.costs.forward((), plan.training_forward)[0]
        layer = whole / self.costs.layers
        left = self._left if plan.training_forward == queue.resting else whole
        spent = 0.0
        while left > REST:
            spent += layer
            left -= layer
            if left > REST and self.now + spent + (layer if plan.inference else 0.0) >= stop:
                break
        self.now += spent
        self._exposed += spent
        self._left = left
        if left > REST:
            self._charge_forward(plan, spent)
            queue.rest(plan.training_forward, spent, layer)
        else:
            self._pay_forward(plan, max(spent, 1e-6), queue.awake())

    def _backward(
        self, plan: StepPlan, noise: float, deadline: float, next_arrival: float, ran: int
    ) -> None:
        """The planned units but for the `ran` first in calls, as far as they end by the deadline and nobody
        arrives; the step's first only has to begin before."""
        queue, is_first = self.scheduler.training, ran == 0
        for span in plan.training_backward:
            sequence, waiting = span.sequence, span.length - min(ran, span.length)
            ran -= span.length - waiting
            while waiting:
                index = sequence.unit_cursor
                length = queue.call_length(
                    sequence, index, waiting, deadline - self.now if plan.inference else None
                )
                ends = self.now + (0.0 if is_first else queue.call_seconds(sequence, index, length))
                if ends >= deadline or self.now >= next_arrival:
                    return
                kind, tokens = sequence.unit_kind(index), sequence.tokens_of(index, length)
                seconds = noise * self._unit_seconds(sequence, kind, tokens)
                self.now += seconds
                self.training_seconds += seconds
                self._exposed += seconds
                self.model.observe_unit(kind, tokens, seconds)
                self._pay(sequence, length, seconds)
                waiting -= length
                is_first = False
