"""A span pays some of the tokens that a sequence owes."""

from __future__ import annotations

import enum

import msgspec

from coserve.core.request import Request
from coserve.core.training_sequence import TrainingSequence


class SpanKind(enum.Enum):
    """What the tokens of a span are for."""

    DECODE = "decode"
    PREFILL = "prefill"
    TRAIN_FORWARD = "train_forward"
    TRAIN_BACKWARD = "train_backward"


class InferenceSpan(msgspec.Struct, frozen=True):
    """Tokens [start, start + length) of a request. `samples`: the last of them yields a new token."""

    kind: SpanKind
    request: Request
    start: int
    length: int
    samples: bool


class TrainingSpan(msgspec.Struct, frozen=True):
    """Forward: tokens [start, start + length) of the microbatch. Backward: units [start, start + length) of
    the pass under way."""

    kind: SpanKind
    sequence: TrainingSequence
    start: int
    length: int
