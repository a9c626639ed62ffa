"""Executes the forward of a step: one ragged batch through the decoder, then tokens for those who are due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from coserve.core.request import Request
from coserve.core.span import InferenceSpan
from coserve.core.step_plan import StepPlan
from coserve.errors import InvalidRequest
from coserve.layers.batch import LayerSaver
from coserve.layers.lm_head import HeadRun
from coserve.layers.pieces import Pieces
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import PIECES, Decoder
from coserve.worker.cuda_graph import BucketedForward, Graphs
from coserve.worker.forward_batch import AdapterRows, WindowSource, build_forward_batch, lora_batch
from coserve.worker.grammar_masks import NO_MASKS, GrammarMasks
from coserve.worker.kv_tensors import KVTensors
from coserve.worker.sampler import SamplingRow, TokenLogprob, sample, score
from coserve.worker.standing_batch import StandingBatches

HEAD_ROWS = 64  # rows of logits made at a time when a prompt is scored


@dataclass(frozen=True)
class Sampled:
    """A request's next token, and its log-probabilities where they were asked for."""

    token_id: int
    logprobs: TokenLogprob | None = None


@dataclass(frozen=True)
class StepResult:
    """What the step's forward gave: by request id, the token of every span that samples, or why it can't have
    one."""

    sampled: dict[str, Sampled] = field(default_factory=dict)
    failed: dict[str, InvalidRequest] = field(default_factory=dict)


@dataclass
class RestingForward:
    """Training windows between two pieces of a forward. `key` says whose: activations, first token and length
    of each."""

    key: list[tuple[LayerSaver, int, int]]
    pieces: Pieces[torch.Tensor]


class ModelRunner:
    """The decoder, the KV cache and the adapter rows, joined. With `graphs` steps replay one if they can;
    `masks` know what grammars forbid."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVTensors,
        pool: AdapterPool,
        slots: AdapterRows,
        graphs: Graphs | None = None,
        masks: GrammarMasks | None = None,
    ) -> None:
        self._masks = masks
        self._decoder = decoder
        self._kv = kv
        self._pool = pool
        self._slots = slots
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._resting: RestingForward | None = None
        self._standing = StandingBatches(decoder, kv)
        self._graphs = None if graphs is None else BucketedForward(decoder, kv, pool, slots, graphs)

    def run(
        self,
        plan: StepPlan,
        microbatches: Mapping[str, WindowSource],
        launched: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Forward all of the plan's inference spans and training windows (but those apart), and sample.

        `microbatches` holds those of `plan.training_forward` by sequence id; their activations are written.
        On a GPU `launched` is called once the forward is on its way, before the sampling waits for it.
        Nothing of the plan is committed: cursors and tokens are the caller's.
        """
        if plan.apart:
            plan = replace(plan, training_forward=[])
        if not plan.inference and not plan.training_forward:
            return StepResult()
        with torch.inference_mode():
            if self._graphs is None and not plan.training_forward and self._standing.takes(plan.inference):
                launched()
                return self._decode(plan)
            x_TH = None if self._graphs is None else self._graphs.forward(plan)
            if x_TH is None:
                batch = build_forward_batch(plan, microbatches, self._kv, self._pool, self._slots)
                x_TH = self._decoder.forward(batch)
            launched()
            self._score_prompts(plan, x_TH)
            return self._sample(plan, x_TH)

    def run_apart(
        self, plan: StepPlan, microbatches: Mapping[str, WindowSource], stop: Callable[[], bool]
    ) -> float:
        """Forward the plan's training windows alone, piece by piece, and rest after one when `stop()`.

        Goes on where the same windows rested, else from the first layer; returns how many layers ran, of the
        last perhaps a part.
        """
        saved = [microbatches[span.sequence.sequence_id].saved for span in plan.training_forward]
        key = [(s, span.start, span.length) for s, span in zip(saved, plan.training_forward, strict=True)]
        with torch.inference_mode():
            work = self._resting
            if work is None or work.key != key:
                alone = replace(plan, inference=[])
                batch = build_forward_batch(alone, microbatches, self._kv, self._pool, self._slots)
                pieces = self._decoder.forward_pieces(self._decoder.embed(batch.token_ids_T), batch)
                work = RestingForward(key, pieces)
            self._resting, ran = None, 0
            for _ in work.pieces:
                ran += 1
                if stop():
                    self._resting = work
                    return ran / PIECES
        return (ran + 1) / PIECES

    @property
    def is_resting(self) -> bool:
        """Windows that ran apart stopped before their end."""
        return self._resting is not None

    def take_prompt_logprobs(self, request: Request) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities, one entry a token (None for the first), once; None when the request
        didn't ask for them."""
        return self._prompt_logprobs.pop(request.sequence_id, None)

    def forget(self, request: Request) -> None:
        """The request is gone before its first output."""
        self._prompt_logprobs.pop(request.sequence_id, None)

    def _decode(self, plan: StepPlan) -> StepResult:
        """A step that only decodes, every row of which is due."""
        spans = plan.inference
        adapters = [span.request.adapter for span in spans]
        # A running request holds its adapter's rows where they are, but for those of a job that parts.
        layout = tuple(map(self._placement, adapters)) if any(adapters) else None
        make_lora = partial(lora_batch, spans, (), (), self._pool, self._slots, self._kv.device)
        h_SH = self._standing.forward(spans, layout, make_lora)
        return self._choose(spans, self._logits(h_SH, adapters))

    def _placement(self, key: str | None) -> int:
        return 0 if key is None else self._pool.placement(self._slots.rows(key))

    def _sample(self, plan: StepPlan, x_TH: torch.Tensor) -> StepResult:
        due: list[InferenceSpan] = []
        last_rows: list[int] = []
        row = 0
        for span in plan.inference:
            row += span.length
            if span.samples and not span.request.wants_no_tokens:
                due.append(span)
                last_rows.append(row - 1)
        if not due:
            return StepResult()
        adapters = [span.request.adapter for span in due]
        x_SH = x_TH[torch.tensor(last_rows, device=x_TH.device)]
        return self._choose(due, self._logits(self._decoder.final_norm(x_SH), adapters))

    def _choose(self, due: Sequence[InferenceSpan], logits_SV: torch.Tensor) -> StepResult:
        requests = [span.request for span in due]
        masks = NO_MASKS if self._masks is None else self._masks.fill(requests)
        chosen = sample(
            logits_SV, [_sampling_row(request, masks.allowed.get(i)) for i, request in enumerate(requests)]
        )
        ids = [request.sequence_id for request in requests]
        return StepResult(
            {
                request_id: Sampled(token_id, logprobs)
                for request_id, token_id, logprobs in zip(ids, chosen.token_ids, chosen.logprobs, strict=True)
            },
            {ids[place]: error for place, error in masks.failed.items()},
        )

    def _score_prompts(self, plan: StepPlan, x_TH: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the rows of this step's prefills."""
        row = 0
        for span in plan.inference:
            request, first_row = span.request, row
            row += span.length
            top = request.sampling.prompt_logprobs
            if top is None or request.num_output_tokens:
                continue
            entries = self._prompt_logprobs.setdefault(
                request.sequence_id, [None] * request.num_prompt_tokens
            )
            end = min(span.start + span.length, request.num_prompt_tokens - 1)
            for begin in range(span.start, end, HEAD_ROWS):
                stop = min(begin + HEAD_ROWS, end)
                rows_SH = x_TH[first_row + begin - span.start : first_row + stop - span.start]
                targets = request.token_ids[begin + 1 : stop + 1]
                adapters = [request.adapter] * len(rows_SH)
                logits_SV = self._logits(self._decoder.final_norm(rows_SH), adapters)
                entries[begin + 1 : stop + 1] = score(logits_SV, targets, top)

    def _logits(self, h_SH: torch.Tensor, adapters: Sequence[str | None]) -> torch.Tensor:
        """[S, V] of normed states, every row with its adapter's part of the head."""
        runs = []
        start = 0
        for key, rows in groupby(adapters):
            end = start + len(list(rows))
            head = None if key is None else self._pool.head(self._slots.rows(key))
            if head is not None:
                runs.append(HeadRun(start, end, head))
            start = end
        return self._decoder.logits(h_SH, runs)


def _sampling_row(request: Request, allowed_W: np.ndarray | None) -> SamplingRow:
    return SamplingRow(
        request.sampling,
        request.token_ids,
        request.num_prompt_tokens,
        request.stop_ids,
        allowed_W,
        request.end_ids,
    )
