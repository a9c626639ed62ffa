"""The output projection to the vocabulary."""

from __future__ import annotations

import torch

from coserve.kernels.linear import PackedLinear


class LMHead(PackedLinear):
    """Frozen linear [V, H]; with tied weights its `weight` is the embedding's tensor itself."""

    def logits(self, h_SH: torch.Tensor) -> torch.Tensor:
        """fp32 [S, V] of final hidden states [S, H]."""
        return self.forward(h_SH).float()
