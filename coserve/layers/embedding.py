"""Token embedding. Frozen, so it has no backward."""

from __future__ import annotations

import torch

from coserve.kernels.linear import PackedLinear


class Embedding:
    """Table [V, H], or the head whose weight it is where they are tied. Rows are multiplied by `scale`,
    rounded to the table's dtype first, as Gemma's are."""

    def __init__(self, table_VH: torch.Tensor | PackedLinear, scale: float = 1.0) -> None:
        self.table = table_VH
        self.scale = (
            torch.tensor(scale, dtype=table_VH.dtype, device=table_VH.device) if scale != 1.0 else None
        )

    @property
    def nbytes(self) -> int:
        """Bytes of a table of its own; a head's are counted there."""
        return self.table.nbytes if isinstance(self.table, torch.Tensor) else 0

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, H] of int64 ids, all inside the vocabulary."""
        table = self.table
        if isinstance(table, torch.Tensor):
            x_TH = table.index_select(0, token_ids_T)
        else:
            x_TH = table.rows(token_ids_T)
        return x_TH if self.scale is None else x_TH.mul_(self.scale)
