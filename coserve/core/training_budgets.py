"""What a step with requests leaves for training: by their targets, and by what jobs are owed in any case."""

from __future__ import annotations

from collections.abc import Sequence

from coserve.core.latency_model import LatencyModel
from coserve.core.slo import PROBE_EVERY, BudgetControl, MinimumShare
from coserve.core.step_demands import Demand
from coserve.core.step_plan import StepPlan
from coserve.core.training_plan import Beside


class TrainingBudgets:
    """Budgets of steps with requests, from the model's predictions and what the steps before them took. Jobs
    have `min_share` of the time, whatever the targets."""

    def __init__(self, model: LatencyModel, min_share: float = 0.0) -> None:
        self.minimum = MinimumShare(min_share)
        self.since_answers = 0.0  # seconds of the last step that training had
        self._model = model
        self._control = BudgetControl()
        self._seen = 0  # steps without training's rows that the model had learnt from,
        self._unprobed = 0  # and the steps with inference since then

    def account(self, seconds: float, training: float, after_answers: float, *, owes: bool) -> None:
        """A step took `seconds`, `training` of them for jobs, who are owed a part if they have work (`owes`),
        and `after_answers` since its tokens."""
        self.since_answers = after_answers if training else 0.0
        if owes:
            self.minimum.account(seconds, training)

    def probes(self, plan: StepPlan) -> bool:
        """Whether this step goes without training, or with it in order, for the model to see one alone. Where
        large parts of prompts always had company nothing would show what such a step takes."""
        rare = self._model.overlaps and plan.inference_tokens > 2 * len(plan.inference)
        self._unprobed += PROBE_EVERY // 4 if rare else 1
        probes = self._unprobed >= PROBE_EVERY
        if probes or (self._seen != self._model.observations and not self._model.overlaps):
            self._unprobed = 0
        self._seen = self._model.observations
        plan.in_order = probes and self._model.overlaps
        return probes

    def allot(self, plan: StepPlan, demands: Sequence[Demand], owed: int, *, retreats: bool) -> Beside:
        """Set the plan's budget, and say what training meets in the step. After it prompts still owe `owed`
        tokens; `retreats`: somebody is better off without training at all."""
        tokens, context, alone = plan.inference_tokens, plan.context_tokens, plan.inference_alone
        wanted = 0.0 if retreats else self.wanted(plan, demands, owed)
        if self._model.overlaps:  # most of it runs beside the forward, whose answers wait for it
            wanted = min(wanted, self._before_answers(alone, wanted, demands))
        plan.concealed = 0.0 if plan.in_order else self._model.idle_seconds(tokens, context)
        least = self.minimum.budget(alone)
        exposed = max(self._control.allow(wanted), least)
        plan.training_budget = exposed + plan.concealed
        # Windows may lengthen the requests' own batch, but not beside a prompt: its rows leave the arithmetic
        # no time to spare.
        in_batch = None
        if tokens == len(plan.inference):
            in_batch = max(self._before_answers(alone, plan.training_budget, demands), least)
        return Beside(tokens, context, in_batch, any(demand.early is not None for demand in demands))

    def wanted(self, plan: StepPlan, demands: Sequence[Demand], owed: int) -> float:
        """Seconds of training that every request's target leaves in the step, after which prompts still owe
        `owed` tokens: none beside those that have no explicit time per token to wait for."""
        alone, guard = plan.inference_alone, self._model.guard
        sampling = [span for span in plan.inference if span.samples]
        context = sum(span.start + span.length + 1 for span in sampling)
        following = self._model.predict_inference(len(sampling) + owed, context + owed)
        least = self._model.predict_inference(1, 1)
        return min(
            0.0
            if owed and d.targets.tpot == 0.0
            else d.targets.training_budget(alone, following, guard, d.wait, d.early, least)
            for d in demands
        )

    def _before_answers(self, alone: float, budget: float, demands: Sequence[Demand]) -> float:
        """Seconds of a training budget that this step's answers may wait for, after the training since the
        last ones."""
        spent = self.since_answers
        return max(0.0, min(d.targets.batch_budget(alone, budget, d.early, spent) for d in demands))
