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
        logits_SV = super().forward(h_SH)
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
