"""The backward pass of a microbatch as a list of small units, in one fixed order.

Loss chunks (before them scores, where the objective's gradient needs those of other chunks too); then layer
by layer from the top to the lowest adapted one; in each the windows, and the chunks, last to first.
The units follow from the data and the configuration alone, never from how the forward was cut, and the pass
may rest between any two of them. Neighbours that join may run in one call, which is faster. Sums over tokens
run in tiles of 64 anchored at the microbatch's start and added last to first, so calls that are cut at
multiples of 64 give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from coserve.core.training_sequence import TILE, TrainingUnit
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraSegments, ModuleGradient
from coserve.layers.batch import BackwardWindow, HeadAdapter, LoraBatch, LoraPool
from coserve.layers.pieces import Pieces
from coserve.models.decoder import Decoder
from coserve.training.loss import head_units, loss_chunk, score_chunk
from coserve.training.microbatch import Microbatch
from coserve.training.objectives import ROWS, Chunk, CrossEntropy, Objective
from coserve.training.trainable_adapter import TrainableAdapter
from coserve.training.unit_calls import UnitCalls


def window_bounds(num_tokens: int, window_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each window, ascending; `window_tokens` 0 stands for a tile."""
    width = window_tokens or TILE
    return [(start, min(start + width, num_tokens)) for start in range(0, num_tokens, width)]


def layer_units(num_tokens: int, num_layers: int, window_tokens: int = 0) -> tuple[TrainingUnit, ...]:
    """The units of so many layers, from the top. Windows whose width a job has set stay as they are."""
    bounds = window_bounds(num_tokens, window_tokens)[::-1]
    return tuple(
        TrainingUnit("layer", end - start, height, joins=not window_tokens and end < num_tokens)
        for height in reversed(range(num_layers))
        for start, end in bounds
    )


def backward_units(
    microbatch: Microbatch,
    objective: Objective,
    num_layers: int,
    lowest_layer: int,
    window_tokens: int = 0,
    *,
    adapts_head: bool = False,
) -> tuple[TrainingUnit, ...]:
    """Every unit of a microbatch's training pass, in order.

    ValueError for a microbatch without trained tokens: it has no gradient.
    """
    if microbatch.num_trained == 0:
        raise ValueError("a microbatch without trained tokens has no backward")
    ahead, loss = _chunks(microbatch, objective, adapts_head)
    tile = TILE if adapts_head else 1
    layers = layer_units(microbatch.num_tokens, num_layers - lowest_layer, window_tokens)
    return (*head_units("score", ahead, tile), *head_units("loss", loss, tile), *layers)


def _chunks(
    microbatch: Microbatch, objective: Objective, adapts_head: bool
) -> tuple[list[Chunk], list[Chunk]]:
    """What is scored ahead, and the chunks of the loss: last to first."""
    chunks = objective.chunks(microbatch, TILE if adapts_head else ROWS)[::-1]
    return [chunk for chunk in chunks if chunk.ahead], list(chunks)


class MicrobatchBackward(UnitCalls):
    """Runs a microbatch's units. The adapter's gradients are added to, in microbatch order of the caller.

    `rows` are the pool rows that the forward used; `grad_scale` is 1 / (`objective.count` of the whole
    optimizer step).
    """

    def __init__(
        self,
        decoder: Decoder,
        microbatch: Microbatch,
        adapter: TrainableAdapter,
        pool: LoraPool,
        rows: Sequence[int],
        *,
        grad_scale: float,
        window_tokens: int = 0,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.microbatch = microbatch
        self.adapter = adapter
        self.pool = pool
        self.objective = objective or CrossEntropy()
        self.grad_scale = grad_scale
        device = microbatch.token_ids_T.device
        self._pool_rows = rows
        self._rows = torch.tensor(list(rows), dtype=torch.int32, device=device)
        self._windows = window_bounds(microbatch.num_tokens, window_tokens)[::-1]
        layers = decoder.config.num_layers
        shape = layers, adapter.lowest_layer, window_tokens
        self.units = backward_units(microbatch, self.objective, *shape, adapts_head=adapter.adapts_head)
        self._lora_by_width: dict[int, LoraBatch] = {}
        self._ahead, self._chunks = _chunks(microbatch, self.objective, adapter.adapts_head)
        self._num_head_units = len(self._ahead) + len(self._chunks)

    @property
    def next(self) -> TrainingUnit | None:
        """The unit that `run_next` would run; None when all are done."""
        return self.units[self.cursor] if self.cursor < len(self.units) else None

    @property
    def done(self) -> bool:
        """The microbatch's gradients are complete."""
        return self.cursor == len(self.units)

    def _pieces(self, length: int) -> Iterator[None]:
        units = self.units[self.cursor : self.cursor + length]
        if not units or len(units) < length:
            raise IndexError(f"{len(units)} units of the microbatch are left, not {length}")
        if not all(unit.joins for unit in units[1:]):
            raise ValueError(f"units {self.cursor} to {self.cursor + length - 1} are no neighbours")
        ahead = len(self._ahead)
        if self.cursor < ahead:
            chunk = _joined(self._ahead[self.cursor : self.cursor + length])
            g = self._head_gradient(chunk)
            head, dropout = (None, None) if g is None else (HeadAdapter(g.a_RK, g.b_RN), g.dropout)
            yield from score_chunk(self.decoder, self.microbatch, chunk, head=head, dropout=dropout)
        elif self.cursor < self._num_head_units:
            if self.cursor == ahead:
                self.microbatch.saved.dh_TH.zero_()
            chunk = _joined(self._chunks[self.cursor - ahead : self.cursor - ahead + length])
            yield from loss_chunk(
                self.decoder,
                self.microbatch,
                chunk,
                self.objective,
                self.grad_scale,
                head=self._head_gradient(chunk),
                needs_input=self.adapter.lowest_layer < self.decoder.config.num_layers,
            )
        else:
            depth, window = divmod(self.cursor - self._num_head_units, len(self._windows))
            yield from self._run_windows(self.decoder.config.num_layers - 1 - depth, window, length)

    def _head_gradient(self, chunk: Chunk) -> ModuleGradient | None:
        microbatch = self.microbatch
        rows = microbatch.trained_rows[chunk.start : chunk.end]
        return self.adapter.head_gradient(self.pool, self._pool_rows, microbatch.dropout_of(rows))

    def _run_windows(self, layer: int, window: int, length: int) -> Pieces[None]:
        microbatch, saved = self.microbatch, self.microbatch.saved
        if window == 0:
            saved.dk_TND.zero_()
            saved.dv_TND.zero_()
        start, end = self._windows[window + length - 1][0], self._windows[window][1]
        dropout = microbatch.dropout(start, end - start)
        work = BackwardWindow(
            start,
            end,
            microbatch.sample_start_T,
            microbatch.positions_T,
            saved.layer(layer),
            saved.dk_TND,
            saved.dv_TND,
            self.adapter.layer_gradients(self.pool, self._rows, layer, dropout),
            layer,
            self._forward_lora(end - start, dropout),
            lowest=layer == self.adapter.lowest_layer,
            gaps_T2=microbatch.gaps_T2,
        )
        dx_WH = yield from self.decoder.layers[layer].backward(saved.dh_TH[start:end], work)
        if dx_WH is not None:
            saved.dh_TH[start:end] = dx_WH

    def _forward_lora(self, tokens: int, dropout: Dropout | None) -> LoraBatch:
        """The adapter for a window that goes forward again, with the masks of its first time."""
        found = self._lora_by_width.get(tokens)
        if found is None:
            device = self._rows.device
            bounds = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, tokens, 0))
            ranks_LMS = self.adapter.ranks_LM[..., None].contiguous()
            found = self._lora_by_width[tokens] = LoraBatch(
                LoraSegments(*bounds, self._rows), ranks_LMS, self.pool
            )
        found.dropout = dropout
        return found


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """Neighbours, last to first, as one."""
    return Chunk(chunks[-1].start, chunks[0].end)
