"""How full a step may be before somebody's first token in it comes late."""

from __future__ import annotations

import sys

from coserve.core.latency_model import LatencyModel
from coserve.core.slo import LatencyTargets
from coserve.core.span import InferenceSpan
from coserve.core.step_plan import StepPlan


def tokens_in_time(
    span: InferenceSpan, plan: StepPlan, model: LatencyModel, default: LatencyTargets, now: float
) -> int:
    """How many more tokens the step of `plan` takes in before the first token that `span` brings in it is
    over its explicit target; any number where there is none, where it is late already, and while nobody
    knows.

    Whoever comes later would fill the step up otherwise, and admission, which could not know of them, would
    have promised too much.
    """
    request = span.request
    target = (request.targets or default).ttft
    if not span.samples or request.num_output_tokens or target == 0.0:
        return sys.maxsize
    left = request.arrival + target - now
    tokens, context = plan.inference_tokens, plan.context_tokens
    if not 0.0 < model.predict_inference(tokens, context) <= left:
        return sys.maxsize
    return model.tokens_within(left, tokens, context)
