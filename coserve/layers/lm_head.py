"""The output projection to the vocabulary, with adapters on the rows that have one.

    u = h W^T,   u[rows] += (h[rows] a^T) b     for each run of rows

The frozen W may be the embedding's table; an adapter adds to the logits alone, so a tied embedding never
changes. Only rows that need logits come here: sampled ones, and the loss's chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from coserve.kernels.dropout import Dropout
from coserve.kernels.linear import PackedLinear
from coserve.kernels.lora import (
    LoraGroup,
    LoraModule,
    LoraSegments,
    ModuleGradient,
    lora_backward,
    lora_forward_,
)
from coserve.layers.batch import HeadAdapter
from coserve.layers.pieces import Pieces


class HeadRun(NamedTuple):
    """Rows [start, end) that share an adapter of the head."""

    start: int
    end: int
    adapter: HeadAdapter
    dropout: Dropout | None = None


class LMHead(PackedLinear):
    """Frozen linear [V, H]; with tied weights the embedding looks its rows up here."""

    def forward(self, h_SH: torch.Tensor, runs: Sequence[HeadRun] = ()) -> torch.Tensor:
        """[S, V] of normed hidden states [S, H], in their dtype."""
        return self._add_adapters(super().forward(h_SH), h_SH, runs)

    def forward_pieces(self, h_SH: torch.Tensor, runs: Sequence[HeadRun] = ()) -> Pieces[torch.Tensor]:
        """As `forward`, to the same bits, a part of the vocabulary at a time."""
        logits_SV = h_SH.new_empty(len(h_SH), self.out_features)
        for columns in self.column_parts(len(h_SH)):
            self.forward_columns(h_SH, logits_SV, columns)
            yield
        return self._add_adapters(logits_SV, h_SH, runs)

    def backward_pieces(self, dlogits_CV: torch.Tensor) -> Pieces[torch.Tensor]:
        """As `backward_input`, to the same bits, some rows at a time."""
        parts = []
        for rows in self.row_parts(len(dlogits_CV)):
            parts.append(self.backward_input(dlogits_CV[rows]))
            yield
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _add_adapters(
        logits_SV: torch.Tensor, h_SH: torch.Tensor, runs: Sequence[HeadRun]
    ) -> torch.Tensor:
        for run in runs:
            rows, (a_RK, b_RN) = slice(run.start, run.end), run.adapter
            rank, own = len(a_RK), {"dtype": torch.int32, "device": a_RK.device}
            # Made on the device: a table copied from the host would hold up the launches behind it.
            first, count = torch.zeros(1, **own), torch.full((1,), run.end - run.start, **own)
            segments = LoraSegments(first, count, first, torch.arange(rank, **own))
            ranks_MS = torch.full((1, 1), rank, **own)
            group = LoraGroup([LoraModule(a_RK, b_RN, salt=run.dropout.salt if run.dropout else 0)])
            lora_forward_(logits_SV[rows], h_SH[rows], group, segments, ranks_MS, run.dropout)
        return logits_SV

    def add_gradient(
        self,
        dlogits_CV: torch.Tensor,
        h_CH: torch.Tensor,
        gradient: ModuleGradient,
        token_offset: int,
        dh_CH: torch.Tensor | None,
    ) -> None:
        """The adapter's gradients into its sums, and its part of dh into `dh` [C, H] where that is wanted.
        `token_offset` is the place of the first row among those of its microbatch that come here."""
        dx_CH = torch.zeros_like(h_CH) if dh_CH is None else dh_CH
        lora_backward(dlogits_CV, h_CH, [gradient], dx_CH, token_offset)
