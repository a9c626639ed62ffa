"""`Engine.step` without a device: coserve/core as it is, under a clock of its own.

The order is the engine's: schedule, forward, answer, training's windows apart, backward units until the
deadline. `Costs` says how long each takes; nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.request import Request
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.core.step_plan import StepPlan

TOKEN = 7  # what every request samples
REST = 1e-12  # seconds of a window that count as nothing left


class Costs(Protocol):
    """Seconds of a step's parts. `overhead` comes with every forward; a window that runs apart is `layers`
    equal pieces; the first `calls_beside` backward calls hide in the forward's idle arithmetic."""

    layers: int
    overhead: float
    calls_beside: int

    def forward(self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]) -> float:
        """One batch of both."""
        ...

    def idle_arithmetic(self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]) -> float:
        """Seconds of that forward in which other arithmetic could run."""
        ...

    def unit(self, kind: str, tokens: int, context: int) -> float:
        """A training unit by the latency model's name for it, its window after `context` keys."""
        ...


class SimulatedEngine:
    """Core's scheduler and a clock, `now`. Of the last step: when it `began`, when its tokens were `answered`
    and the requests that have `sampled` one. `noise` draws the factor by which a step's times vary."""

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
        self.model = LatencyModel()
        self.scheduler = Scheduler(limits, pool, self.model, targets, adapter_ready, adapter_released)
        self.now = self.began = self.answered = 0.0
        self.sampled: list[Request] = []
        self.training_seconds = 0.0
        self._noise = noise
        self._left = 0.0  # seconds that resting windows still owe

    def step(self, next_arrival: float = math.inf) -> StepPlan:
        """One step; a plan without spans takes no time. Training alone ends early at `next_arrival`."""
        plan = self.scheduler.schedule(self.now)
        self.began = self.answered = self.now
        self.sampled = []
        if plan.empty:
            return plan
        noise, trained = self._noise(), self.training_seconds
        windows = [] if plan.apart else plan.training_forward
        hidden = 0.0
        shared = bool(self.costs.calls_beside and plan.training_backward)
        if plan.inference or windows:
            self.now += self.costs.overhead + noise * self.costs.forward(plan.inference, windows)
            if shared:
                hidden = noise * self.costs.idle_arithmetic(plan.inference, windows)
        self.answered = self.now
        seconds = self.now - self.began
        self._answer(plan)
        if plan.inference and not windows and not shared:
            self.model.observe_inference(plan.inference_tokens, plan.context_tokens, seconds)
        deadline = self.began + plan.inference_alone + plan.training_budget
        if plan.apart:
            self._forward_apart(plan, noise, deadline if plan.inference else next_arrival)
        elif windows:
            self._pay_forward(plan, max(seconds - plan.inference_alone, 1e-6))
        self._backward(plan, noise, deadline, math.inf if plan.inference else next_arrival, hidden)
        self.scheduler.account(self.now - self.began, self.training_seconds - trained)
        return plan

    def _answer(self, plan: StepPlan) -> None:
        self.scheduler.commit(plan)
        for span in plan.inference:
            request = span.request
            if span.samples and not request.finished:
                self.sampled.append(request)
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
        self.model.observe_unit("apart" if plan.apart else "forward", rows, seconds + earlier)
        for span in plan.training_forward:
            span.sequence.cursor += span.length
            self.scheduler.training.release_head(span.sequence)

    def _forward_apart(self, plan: StepPlan, noise: float, stop: float) -> None:
        """Layer by layer until `stop`, beside requests while the next one ends by then; rests there."""
        queue = self.scheduler.training
        whole = noise * self.costs.forward((), plan.training_forward)
        layer = whole / self.costs.layers
        left = self._left if plan.training_forward == queue.resting else whole
        spent = 0.0
        while left > REST:
            spent += layer
            left -= layer
            if left > REST and self.now + spent + (layer if plan.inference else 0.0) >= stop:
                break
        self.now += spent
        self._left = left
        if left > REST:
            self._charge_forward(plan, spent)
            queue.rest(plan.training_forward, spent, layer)
        else:
            self._pay_forward(plan, max(spent, 1e-6), queue.awake())

    def _backward(
        self, plan: StepPlan, noise: float, deadline: float, next_arrival: float, hidden: float
    ) -> None:
        """The planned units in calls, as far as they end by the deadline and nobody arrives; the first only
        has to begin before."""
        queue, calls = self.scheduler.training, 0
        for span in plan.training_backward:
            sequence, waiting = span.sequence, span.length
            while waiting:
                index, is_beside = sequence.unit_cursor, calls < self.costs.calls_beside
                left = plan.training_budget if is_beside else deadline - self.now
                length = queue.call_length(sequence, index, waiting, left if plan.inference else None)
                ends = self.now + (queue.call_seconds(sequence, index, length) if calls else 0.0)
                if not is_beside and (ends >= deadline or self.now >= next_arrival):
                    return
                kind, tokens = sequence.unit_kind(index), sequence.tokens_of(index, length)
                context = max(0, sequence.num_tokens - tokens) // 2
                seconds = noise * self.costs.unit(kind, tokens, context)
                concealed = min(hidden, seconds) if is_beside else 0.0
                hidden -= concealed
                self.now += seconds - concealed
                self.training_seconds += seconds
                self.model.observe_unit(kind, tokens, seconds)
                queue.charge(sequence.job_id, seconds)
                sequence.pay_units(length)
                waiting -= length
                calls += 1
                if sequence.done:
                    queue.release(sequence)
