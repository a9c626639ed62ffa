"""What one step will do: the scheduler's whole output."""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve.core.request import Request
from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.core.training_sequence import TrainingSequence


@dataclass(slots=True)
class StepPlan:
    """Spans of one step, inference rows ordered by adapter so that neighbours share a LoRA segment.

    Predictions are seconds, 0 while the latency model can't tell: `inference_alone` for the inference rows,
    `predicted` for the whole forward. `training_budget` is what training may take in this step, `concealed`
    of it beside the forward in seconds that cost nothing. To make room, microbatches in `downgraded` now keep
    less, those in `evicted` nothing. `apart`: the forward windows are a batch of their own that runs after
    the requests', layer by layer, and may rest. `in_order`: calls run after the forward though they could run
    beside it, which shows what each takes by itself.
    """

    inference: list[InferenceSpan] = field(default_factory=list)
    training_forward: list[TrainingSpan] = field(default_factory=list)
    training_backward: list[TrainingSpan] = field(default_factory=list)
    apart: bool = False
    in_order: bool = False
    preempted: list[Request] = field(default_factory=list)
    evicted: list[TrainingSequence] = field(default_factory=list)
    downgraded: list[TrainingSequence] = field(default_factory=list)
    training_budget: float = 0.0
    concealed: float = 0.0
    inference_alone: float = 0.0
    predicted: float = 0.0

    @property
    def window_rows(self) -> int:
        """Training's rows in the requests' batch."""
        return 0 if self.apart else sum(span.length for span in self.training_forward)

    @property
    def end(self) -> float:
        """Seconds from the step's begin to the deadline of what runs after the requests' batch."""
        return self.inference_alone + self.training_budget - self.concealed

    @property
    def empty(self) -> bool:
        """There is nothing to do."""
        return not (self.inference or self.training_forward or self.training_backward)

    @property
    def inference_tokens(self) -> int:
        """Rows of the step that belong to requests."""
        return sum(span.length for span in self.inference)

    @property
    def context_tokens(self) -> int:
        """Keys that the step's queries look at, decode rows counting their whole context."""
        return sum(span.start + span.length for span in self.inference)

    @property
    def kind(self) -> str:
        """"inference", "training" or "mixed", as the step histogram labels it."""
        training = bool(self.training_forward or self.training_backward)
        if not self.inference:
            return "training"
        return "mixed" if training else "inference"
