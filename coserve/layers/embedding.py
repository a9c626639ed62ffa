"""Token embedding. Frozen, so it has no backward."""

from __future__ import annotations

import torch


class Embedding:
    """Table [V, H]; a tied head shares its storage. Rows are multiplied by `scale`, rounded to the table's
    dtype first, as Gemma's are."""

    def __init__(self, weight_VH: torch.Tensor, scale: float = 1.0) -> None:
        self.weight = weight_VH
        self.scale = torch.tensor(scale).to(weight_VH) if scale != 1.0 else None

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, H] of int64 ids, all inside the vocabulary."""
        x_TH = self.weight.index_select(0, token_ids_T)
        return x_TH if self.scale is None else x_TH.mul_(self.scale)
