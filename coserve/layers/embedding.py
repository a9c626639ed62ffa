"""Token embedding. Frozen, so it has no backward."""

from __future__ import annotations

import torch


class Embedding:
    """Table [V, H]; a tied head shares its storage."""

    def __init__(self, weight_VH: torch.Tensor) -> None:
        self.weight = weight_VH

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, H] of int64 ids, all inside the vocabulary."""
        return self.weight.index_select(0, token_ids_T)
