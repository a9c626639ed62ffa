"""Decoding with the same rows step after step: tensors that stay in place, and a tape of the decoder's pass.

A step that only decodes differs from the one before in numbers alone, one token, position and slot a request.
They are written into standing tables; the layers are recorded once (kernels/tape.py) and then played.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from coserve.core.span import InferenceSpan, SpanKind
from coserve.kernels.dispatch import native_for
from coserve.kernels.tape import Tape, record
from coserve.layers.batch import ForwardBatch, InferenceRows, LoraBatch
from coserve.models.decoder import Decoder
from coserve.worker.kv_tensors import KVTensors

KEPT_BYTES = 64 << 20  # of memory that tapes hold
MOST_LAYOUTS = 64
STEPS_WITH_ADAPTERS = 32  # of a layout before it is recorded, which costs two steps and saves a part of each
FEWEST_BLOCKS = 16  # columns of a standing block table; it doubles when a request outgrows it


class StandingBatch:
    """Decode rows in one layout: their tables, and the tape once there is one."""

    def __init__(self, rows: int, blocks: int, kv: KVTensors, lora: LoraBatch | None) -> None:
        self._block_size = kv.block_size
        self._ids = np.zeros(rows, dtype=np.int64)
        self._positions = np.zeros(rows, dtype=np.int64)
        self._slots = np.zeros(rows, dtype=np.int64)
        self._lengths = np.zeros(rows, dtype=np.int32)
        self._tables = np.zeros((rows, blocks), dtype=np.int32)
        self._written: list[tuple[list[int], int]] = [([], 0)] * rows
        inference = InferenceRows(
            rows=rows,
            slots_T=torch.from_numpy(self._slots),
            block_tables_SB=torch.from_numpy(self._tables),
            query_start_S1=torch.arange(rows + 1, dtype=torch.int32),
            context_lens_S=torch.from_numpy(self._lengths),
            kv=kv,
        )
        ids_T, positions_T = torch.from_numpy(self._ids), torch.from_numpy(self._positions)
        self._batch = ForwardBatch(ids_T, positions_T, inference, [], lora)
        self._x_TH: torch.Tensor | None = None
        self._tape: Tape | None = None
        self.steps = 0  # that it was used in
        self.rests = False  # it can't be recorded

    @property
    def nbytes(self) -> int:
        """Memory of its tape."""
        return 0 if self._tape is None else self._tape.nbytes

    def fill(self, spans: Sequence[InferenceSpan]) -> None:
        """This step's numbers. A block table is written when it is another or has grown."""
        size = self._block_size
        for row, span in enumerate(spans):
            table, position = span.request.block_table, span.start
            self._ids[row] = span.request.token_ids[position]
            self._positions[row] = position
            self._slots[row] = table[position // size] * size + position % size
            self._lengths[row] = position + 1
            known, count = self._written[row]
            if known is not table or count != len(table):
                self._tables[row, : len(table)] = table
                self._written[row] = table, len(table)

    def forward(self, decoder: Decoder) -> torch.Tensor:
        """[rows, H] after the final norm, by the tape where there is one."""
        x_TH = decoder.embed(self._batch.token_ids_T)
        if self._tape is None or self._x_TH is None:
            return self._layers(decoder, x_TH)
        self._x_TH.copy_(x_TH)
        return self._tape.play()

    def record(self, decoder: Decoder) -> None:
        """Make the tape with this step's numbers, unless it was made or can't be."""
        if self._tape is None and not self.rests:
            x_TH = self._x_TH = decoder.embed(self._batch.token_ids_T).clone()
            self._tape = record(lambda: self._layers(decoder, x_TH))
            if self.nbytes > KEPT_BYTES:
                self._tape = None
            self.rests = self._tape is None

    def _layers(self, decoder: Decoder, x_TH: torch.Tensor) -> torch.Tensor:
        return decoder.final_norm(decoder.forward_layers(x_TH, self._batch))


class StandingBatches:
    """The layouts of late; those not used for longest go when tapes hold too much."""

    def __init__(self, decoder: Decoder, kv: KVTensors) -> None:
        self._decoder = decoder
        self._kv = kv
        self._batches: OrderedDict[Hashable, StandingBatch] = OrderedDict()

    def takes(self, spans: Sequence[InferenceSpan]) -> bool:
        """Every row decodes, with the compiled module."""
        native = native_for(self._kv.layer(0)[0])
        return native is not None and all(span.kind is SpanKind.DECODE for span in spans)

    def forward(
        self, spans: Sequence[InferenceSpan], adapters: Hashable, make_lora: Callable[[], LoraBatch | None]
    ) -> torch.Tensor:
        """[rows, H] after the final norm. What `make_lora` gives stays good while `adapters` is the same.

        A layout that comes twice in a row is recorded, one with adapters when it has come often: there are as
        many of those as ways to mix adapters.
        """
        longest = max(len(span.request.block_table) for span in spans)
        blocks = max(FEWEST_BLOCKS, 1 << (longest - 1).bit_length())
        key = (len(spans), blocks, adapters)
        standing, again = self._batches.get(key), key == next(reversed(self._batches), None)
        if standing is None:
            standing = self._batches[key] = StandingBatch(len(spans), blocks, self._kv, make_lora())
        standing.fill(spans)
        standing.steps += 1
        if again:
            if adapters is None or standing.steps >= STEPS_WITH_ADAPTERS:
                standing.record(self._decoder)
        else:
            self._batches.move_to_end(key)
            self._drop_old()
        return standing.forward(self._decoder)

    def _drop_old(self) -> None:
        held = sum(standing.nbytes for standing in self._batches.values())
        while held > KEPT_BYTES or len(self._batches) > MOST_LAYOUTS:
            held -= self._batches.pop(self._oldest(taped=held > KEPT_BYTES)).nbytes

    def _oldest(self, *, taped: bool) -> Hashable:
        """The layout that wasn't used for longest, of those with a tape or of those without where there is
        one: mixes of adapters, which come and go, leave the tapes of others alone."""
        older = list(self._batches)[:-1]
        return next((key for key in older if bool(self._batches[key].nbytes) == taped), older[0])
