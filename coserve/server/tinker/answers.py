"""What calls answer, as JSON and, where the client wants it, as protobuf."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from coserve.engine.messages import TokenLogprobs
from coserve.server.grpc_gen import tinker_pb2 as pb
from coserve.training.model_calls import CallResult

MASKED = -99999.0  # where fewer than k tokens have a log-probability, as the client reads it


@dataclass(frozen=True)
class Answer:
    """`size` is about that of its bytes; `protobuf` None: only JSON is read of it."""

    json: Callable[[], Any]
    protobuf: Callable[[], bytes] | None = None
    size: int = 256


def plain(**body: Any) -> Answer:
    """A small JSON answer."""
    return Answer(lambda: body)


def pass_answer(result: CallResult) -> Answer:
    """Of forward and forward_backward: each target's log-probability, and the loss."""
    size = 256 + sum(len(part) for part in result.logprobs)
    return Answer(lambda: _pass_json(result), lambda: _pass_protobuf(result), size)


def _pass_json(result: CallResult) -> dict[str, Any]:
    outputs = []
    for part, width in zip(result.logprobs, _widths(result), strict=True):
        values = np.frombuffer(part, dtype="<f4")
        shape = [len(values)] if width == 1 else [len(values) // width, width]
        outputs.append({"logprobs": {"data": values.tolist(), "dtype": "float32", "shape": shape}})
    return {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": outputs,
        "metrics": {name: _number(value) for name, value in result.metrics.items()},
    }


def _widths(result: CallResult) -> list[int]:
    return result.widths or [1] * len(result.logprobs)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pass_protobuf(result: CallResult) -> bytes:
    answer = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    parts = zip(_widths(result), result.logprobs, strict=True)
    for width, run in groupby(parts, key=lambda pair: pair[0]):  # a record is as wide throughout
        logprobs = [part for _, part in run]
        lengths = np.asarray([0, *(len(part) for part in logprobs)], dtype="<i8")
        tensor = pb.BatchedTensor(
            data=b"".join(logprobs), offsets=np.cumsum(lengths).tobytes(), dtype=pb.DTYPE_FLOAT32
        )
        tensor.trailing_shape.extend([width] if width > 1 else [])
        answer.loss_fn_outputs.add(
            type_tag="ArrayRecord", fields={"logprobs": tensor}, num_datums=len(logprobs)
        )
    return answer.SerializeToString()


@dataclass
class SampledSequence:
    """One sample: its tokens with the one that ended it, and the log-probability of each."""

    stop_reason: str = "stop"
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Sampled:
    """All samples of a prompt. `prompt` is None unless it was to be scored; `top` and `prompt_top` say how
    many alternatives were asked for at each position."""

    sequences: Sequence[SampledSequence]
    prompt: Sequence[TokenLogprobs | None] | None
    top: int
    prompt_top: int
    cached_tokens: int

    def answer(self) -> Answer:
        """For its future."""
        tokens = sum(len(sequence.tokens) for sequence in self.sequences)
        size = 256 + 8 * (1 + self.top) * tokens + 8 * (1 + self.prompt_top) * len(self.prompt or ())
        return Answer(self._json, self._protobuf, size)

    def _json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "type": "sample",
            "sequences": [
                {
                    "stop_reason": sequence.stop_reason,
                    "tokens": sequence.tokens,
                    "logprobs": [entry.logprob for entry in sequence.logprobs],
                    "topk_logprobs": _pairs(sequence.logprobs) if self.top else None,
                }
                for sequence in self.sequences
            ],
            "prompt_cache_hit_tokens": self.cached_tokens,
        }
        if self.prompt is not None:
            body["prompt_logprobs"] = [entry and entry.logprob for entry in self.prompt]
            body["topk_prompt_logprobs"] = _pairs(self.prompt) if self.prompt_top else None
        return body

    def _protobuf(self) -> bytes:
        answer = pb.SampleResponse(prompt_cache_hit_tokens=self.cached_tokens)
        for sequence in self.sequences:
            reason = pb.STOP_REASON_LENGTH if sequence.stop_reason == "length" else pb.STOP_REASON_STOP
            message = answer.sequences.add(stop_reason=reason)
            message.tokens = np.asarray(sequence.tokens, dtype="<i4").tobytes()
            message.logprobs = _column(sequence.logprobs)
            if self.top:
                message.topk_sampled_logprobs.CopyFrom(_matrix(sequence.logprobs, self.top))
        if self.prompt is not None:
            answer.prompt_logprobs = _column(self.prompt)
            if self.prompt_top:
                answer.topk_prompt_logprobs.CopyFrom(_matrix(self.prompt, self.prompt_top))
        return answer.SerializeToString()


def _pairs(entries: Sequence[TokenLogprobs | None]) -> list[list[tuple[int, float]] | None]:
    return [entry and entry.top for entry in entries]


def _column(entries: Sequence[TokenLogprobs | None]) -> bytes:
    values = [math.nan if entry is None else entry.logprob for entry in entries]
    return np.asarray(values, dtype="<f4").tobytes()


def _matrix(entries: Sequence[TokenLogprobs | None], k: int) -> pb.TopkLogprobs:
    ids = np.zeros((len(entries), k), dtype="<i4")
    logprobs = np.full((len(entries), k), MASKED, dtype="<f4")
    for row, entry in enumerate(entries):
        for column, (token_id, logprob) in enumerate(entry.top[:k] if entry is not None else ()):
            ids[row, column], logprobs[row, column] = token_id, logprob
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(entries))
