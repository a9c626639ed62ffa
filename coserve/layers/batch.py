"""What every layer's forward reads: one ragged batch of inference rows and training windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraGroup, LoraSegments, ModuleGradient, ProductLora
from coserve.layers.activations import LayerActivations


class KV(Protocol):
    """The paged key-value cache."""

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_cache, v_cache) [B, block_size, Nkv, D] of one layer; the block stride is free."""
        ...


class HeadAdapter(NamedTuple):
    """One adapter's own tensors for the head, in the compute dtype: a_RK [r, H], b_RN [r, V], which is B
    transposed times the scale."""

    a_RK: torch.Tensor
    b_RN: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.a_RK.nbytes + self.b_RN.nbytes


class LoraPool(Protocol):
    """All adapters' weights on the device, as rows."""

    def rows(self, module: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(a_RK, b_RN) of a module by its number in `linear_modules`; b is B transposed times the scale."""
        ...

    def group(self, parts: tuple[tuple[int, int], ...], layer: int) -> LoraGroup:
        """Modules of a merged product in one layer, by number and first column of the product."""
        ...

    def head(self, rows: Sequence[int]) -> HeadAdapter | None:
        """What the adapter in `rows` adds to the head; None where it leaves the head alone."""
        ...


class LayerSaver(Protocol):
    """Where a microbatch keeps what its backward needs."""

    def layer(self, layer: int) -> LayerActivations:
        """Buffers of one layer."""
        ...


@dataclass(frozen=True)
class SingleLayer:
    """The saver of a window that runs through one layer alone."""

    saved: LayerActivations

    def layer(self, layer: int) -> LayerActivations:
        """That layer's."""
        return self.saved


@dataclass(frozen=True)
class InferenceRows:
    """Rows [0, rows) of the batch: decode and prefill tokens of the requests, sequence by sequence.

    slots_T int64 (block * block_size + offset; negative stores nothing), block_tables_SB int32,
    query_start_S1 int32, context_lens_S int32 (all keys, those of this step's tokens included).
    """

    rows: int
    slots_T: torch.Tensor
    block_tables_SB: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    kv: KV


@dataclass(frozen=True)
class TrainingWindow:
    """Rows [row_start, row_start + rows) of the batch are tokens [window_start, window_start + rows) of a
    microbatch. `sample_start_W` int32 is the stream index where each token's sample begins, its shared prefix
    included; `gaps_W2` int32 says what lies between that prefix and the rest of the sample (None: no sample
    shares one). `x_out_TH` takes the last layer's output; None where only a part of the model runs. `dropout`
    has the tokens' keys and one rate for them; None where nothing is dropped."""

    row_start: int
    rows: int
    window_start: int
    sample_start_W: torch.Tensor
    saved: LayerSaver
    x_out_TH: torch.Tensor | None = None
    dropout: Dropout | None = None
    gaps_W2: torch.Tensor | None = None

    @property
    def batch_rows(self) -> slice:
        """The window's rows in the batch."""
        return slice(self.row_start, self.row_start + self.rows)

    @property
    def stream(self) -> slice:
        """The window's tokens in its microbatch."""
        return slice(self.window_start, self.window_start + self.rows)


@dataclass
class LoraBatch:
    """Which adapter each row uses. `ranks_LMS` int32 [L, modules, S]: the rank of segment s in that module
    of that layer, 0 where its adapter leaves it alone. `dropout` has a key for every row of the batch and a
    rate for every segment; None where nothing is dropped. `adapted` by [layer][module]: some row may have
    an adapter there; taken from the ranks where it isn't given, which come from the host then, so that nobody
    waits for the device to know it."""

    segments: LoraSegments
    ranks_LMS: torch.Tensor
    pool: LoraPool
    dropout: Dropout | None = None
    adapted: list[list[bool]] = field(default_factory=list, repr=False)
    _ranks: tuple[torch.Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.adapted:
            self._look_at_ranks()
        self._ranks = self.ranks_LMS.unbind(0)

    def _look_at_ranks(self) -> None:
        if self.ranks_LMS.numel():
            self.adapted = (self.ranks_LMS.amax(-1) > 0).tolist()
        else:
            layers, modules, _ = self.ranks_LMS.shape
            self.adapted = [[False] * modules for _ in range(layers)]
        self.ranks_LMS = self.ranks_LMS.to(self.segments.rows.device)

    def product(self, parts: tuple[tuple[int, int], ...], layer: int) -> ProductLora | None:
        """What the rows have on a merged product, its modules by number and first column; None where no row
        may have an adapter on any of them."""
        adapted = self.adapted[layer]
        for module, _ in parts:
            if adapted[module]:
                group = self.pool.group(parts, layer)
                return ProductLora(group, self.segments, self._ranks[layer], self.dropout)
        return None


@dataclass(frozen=True)
class ForwardBatch:
    """token_ids_T and positions_T int64; inference rows come first, training windows follow in order."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    inference: InferenceRows | None
    windows: list[TrainingWindow]
    lora: LoraBatch | None


@dataclass(frozen=True)
class BackwardWindow:
    """Tokens [start, end) of a microbatch in one layer's backward; windows go last to first.

    `sample_start_T` and `gaps_T2` as in the forward, `positions_T` int64 and `saved` cover the microbatch, as
    do `dk_TND`, `dv_TND` (fp32, zeroed before the layer's last window). `lora` maps module numbers to
    gradients. `layer` and `rows_lora`, the adapter as the forward of these tokens had it, are for
    recomputing. In the `lowest` adapted layer nobody needs the gradient w.r.t. the input.
    """

    start: int
    end: int
    sample_start_T: torch.Tensor
    positions_T: torch.Tensor
    saved: LayerActivations
    dk_TND: torch.Tensor
    dv_TND: torch.Tensor
    lora: dict[int, ModuleGradient]
    layer: int = 0
    rows_lora: LoraBatch | None = None
    lowest: bool = False
    gaps_T2: torch.Tensor | None = None

    @property
    def gaps_W2(self) -> torch.Tensor | None:
        """The window's own."""
        return None if self.gaps_T2 is None else self.gaps_T2[self.stream]

    @property
    def stream(self) -> slice:
        """The window's tokens in its microbatch."""
        return slice(self.start, self.end)

    def forward_batch(self, saved: LayerActivations) -> ForwardBatch:
        """The window as a batch of its own for this one layer, which keeps what it makes in `saved`. A part
        of a layer's forward reads no token ids, so positions stand in for them."""
        positions_W = self.positions_T[self.stream]
        rows = self.end - self.start
        starts_W = self.sample_start_T[self.stream]
        window = TrainingWindow(0, rows, self.start, starts_W, SingleLayer(saved), gaps_W2=self.gaps_W2)
        return ForwardBatch(positions_W, positions_W, None, [window], self.rows_lora)
