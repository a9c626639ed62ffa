"""Which of a step's backward calls run beside its forward, where the device can (a GPU's second stream)."""

from __future__ import annotations

from typing import NamedTuple

from coserve.core.latency_model import LatencyModel
from coserve.core.slo import CALLS_BESIDE
from coserve.core.step_plan import StepPlan
from coserve.core.training_queue import TrainingQueue
from coserve.core.training_sequence import TrainingSequence


class CallBeside(NamedTuple):
    """The `length` next units of a sequence as one call of `tokens`, which takes `seconds` by itself."""

    sequence: TrainingSequence
    length: int
    kind: str
    tokens: int
    seconds: float


def calls_beside(
    plan: StepPlan, queue: TrainingQueue, model: LatencyModel, most: int = CALLS_BESIDE
) -> list[CallBeside]:
    """The first planned calls, `most` at most, up to one whose cost nothing has shown yet: beside a forward
    it couldn't be told, so that one runs after it. None without requests: there is no forward then."""
    found: list[CallBeside] = []
    for span in plan.training_backward if plan.inference and not plan.in_order else ():
        sequence, index, end = span.sequence, span.start, span.start + span.length
        while index < end:
            length = queue.call_length(sequence, index, end - index, plan.training_budget)
            kind, tokens = sequence.unit_kind(index), sequence.tokens_of(index, length)
            if len(found) >= most or not model.knows_unit(kind, tokens):
                return found
            found.append(CallBeside(sequence, length, kind, tokens, model.mean_unit(kind, tokens)))
            index += length
    return found
