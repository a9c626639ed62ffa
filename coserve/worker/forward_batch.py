"""A step's plan as the tensors that the layers read: all forward tokens in one ragged batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.core.step_plan import StepPlan
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraSegments
from coserve.layers.batch import ForwardBatch, InferenceRows, LayerSaver, LoraBatch, TrainingWindow
from coserve.lora.adapter_pool import AdapterPool
from coserve.worker.kv_tensors import KVTensors


class WindowSource(Protocol):
    """A microbatch with memory for its activations (training/microbatch.py)."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor

    @property
    def saved(self) -> LayerSaver:
        """The activations."""
        ...

    def window(self, row_start: int, start: int, length: int, *, trains: bool = True) -> TrainingWindow:
        """Tokens [start, start + length) as rows of a batch from `row_start` on, in a pass that trains or one
        that only scores."""
        ...


class AdapterRows(Protocol):
    """Who knows which pool rows an adapter has (core/adapter_slots.py)."""

    def rows(self, key: str) -> list[int]:
        """The adapter's rows in rank order; KeyError when it has none."""
        ...


def build_forward_batch(
    plan: StepPlan,
    microbatches: Mapping[str, WindowSource],
    kv: KVTensors,
    pool: AdapterPool,
    slots: AdapterRows,
    device: torch.device | None = None,
) -> ForwardBatch:
    """Inference rows in the plan's order, then the training windows; on the cache's device if none is given.

    Neighbouring rows of one adapter share a LoRA segment. Raises KeyError for an adapter without rows on the
    device: it must never be computed as the base.
    """
    device = device or kv.device
    token_ids = [_tokens(span) for span in plan.inference]
    positions = [np.arange(span.start, span.start + span.length) for span in plan.inference]
    row = sum(span.length for span in plan.inference)
    inference = _inference_rows(plan.inference, positions, row, kv, device) if plan.inference else None
    ids_T = [torch.from_numpy(np.concatenate(token_ids)).to(device)] if token_ids else []
    positions_T = [torch.from_numpy(np.concatenate(positions)).to(device)] if positions else []
    windows = []
    for span in plan.training_forward:
        microbatch = microbatches[span.sequence.sequence_id]
        windows.append(microbatch.window(row, span.start, span.length, trains=span.sequence.trains))
        ids_T.append(microbatch.token_ids_T[span.start : span.start + span.length])
        positions_T.append(microbatch.positions_T[span.start : span.start + span.length])
        row += span.length
    dropped = [window.dropout for window in windows]
    lora = lora_batch(plan.inference, plan.training_forward, dropped, pool, slots, device)
    return ForwardBatch(torch.cat(ids_T), torch.cat(positions_T), inference, windows, lora)


def _tokens(span: InferenceSpan) -> np.ndarray:
    return np.asarray(span.request.token_ids[span.start : span.start + span.length], dtype=np.int64)


def _inference_rows(
    spans: Sequence[InferenceSpan],
    positions: Sequence[np.ndarray],
    rows: int,
    kv: KVTensors,
    device: torch.device,
) -> InferenceRows:
    block_size = kv.block_size
    blocks_used = [-(-(span.start + span.length) // block_size) for span in spans]
    tables = np.zeros((len(spans), max(blocks_used)), dtype=np.int32)
    slots = np.empty(rows, dtype=np.int64)
    starts = np.zeros(len(spans) + 1, dtype=np.int32)
    for index, (span, used, where) in enumerate(zip(spans, blocks_used, positions, strict=True)):
        table = np.asarray(span.request.block_table[:used], dtype=np.int32)
        tables[index, :used] = table
        starts[index + 1] = starts[index] + span.length
        slots[starts[index] : starts[index + 1]] = (
            table[where // block_size].astype(np.int64) * block_size + where % block_size
        )
    lengths = np.array([span.start + span.length for span in spans], dtype=np.int32)
    return InferenceRows(
        rows=rows,
        slots_T=torch.from_numpy(slots).to(device),
        block_tables_SB=torch.from_numpy(tables).to(device),
        query_start_S1=torch.from_numpy(starts).to(device),
        context_lens_S=torch.from_numpy(lengths).to(device),
        kv=kv,
    )


def lora_batch(
    inference: Sequence[InferenceSpan],
    training: Sequence[TrainingSpan],
    dropped: Sequence[Dropout | None],
    pool: AdapterPool,
    slots: AdapterRows,
    device: torch.device,
) -> LoraBatch | None:
    """Which adapter each row of these spans uses; None when none does. KeyError as above."""
    keys: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    dropout: list[Dropout | None] = []
    spans = [(span.request.adapter, span.length, None) for span in inference]
    spans += [(s.sequence.adapter, s.length, d) for s, d in zip(training, dropped, strict=True)]
    token = 0
    for key, length, drop in spans:
        begin, token = token, token + length
        if key is None:
            continue
        if keys and keys[-1] == key and ends[-1] == begin and drop is None and dropout[-1] is None:
            ends[-1] = token
        else:
            keys.append(key)
            starts.append(begin)
            ends.append(token)
            dropout.append(drop)
    if not keys:
        return None
    rows = [slots.rows(key) for key in keys]
    offsets = np.cumsum([0, *(len(own) for own in rows[:-1])]).tolist()
    segments = LoraSegments(
        *(
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (starts, ends, offsets, [row for own in rows for row in own])
        )
    )
    ranks_LMS = torch.stack([pool.ranks(own) for own in rows], dim=-1)
    return LoraBatch(segments, ranks_LMS, pool, _dropout_rows(dropout, starts, token))


def _dropout_rows(segments: Sequence[Dropout | None], starts: Sequence[int], rows: int) -> Dropout | None:
    """The segments' dropout over the whole batch, rate 0 where there is none; None when there is none at
    all."""
    dropped = [(index, drop) for index, drop in enumerate(segments) if drop is not None]
    if not dropped:
        return None
    first = dropped[0][1]
    keys_T = first.keys_T.new_zeros(rows)
    rates_S = first.rates_S.new_zeros(len(segments))
    for index, drop in dropped:
        keys_T[starts[index] : starts[index] + len(drop.keys_T)] = drop.keys_T
        rates_S[index] = drop.rates_S[0]
    return Dropout(keys_T, rates_S)
