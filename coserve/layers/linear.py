"""One or more linears of a block merged into a single product, each with its own adapter.

    y = x W^T + b;   per module m on its columns:  y_m += sum_i (x . a_i) b_i
    dx = dy W + sum_m (dy_m b^T) a

The frozen weight gets no gradient; the adapter's go to fp32 sums (see kernels/lora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from coserve.kernels.linear import PackedLinear
from coserve.kernels.lora import ModuleGradient, ProductLora, lora_backward, lora_expand_, lora_forward_
from coserve.layers.batch import LoraBatch


class AdaptedLinear:
    """`weights` [N_m, K] of the modules numbered `modules`, merged row-wise in that order and
    held in `dtype` on `device` (default: the weights' own), where the biases are."""

    def __init__(
        self,
        modules: Sequence[int],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        given = [b for b in biases if b is not None]
        bias = (torch.cat(given) if len(given) > 1 else given[0]) if given else None
        self.packed = PackedLinear(weights, bias, dtype, device)
        self.parts: list[tuple[int, slice]] = []
        end = 0
        for module, part in zip(modules, weights, strict=True):
            self.parts.append((module, slice(end, end + len(part))))
            end += len(part)
        self._columns = tuple((module, columns.start) for module, columns in self.parts)

    def adapters(self, lora: LoraBatch | None, layer: int) -> ProductLora | None:
        """What the batch's rows have on this product; None where none has an adapter."""
        return None if lora is None else lora.product(self._columns, layer)

    def forward(
        self,
        x_TK: torch.Tensor,
        lora: LoraBatch | None,
        layer: int,
        out: torch.Tensor | None = None,
        h_MPTR: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y [T, sum of N_m] of x [T, K], every row with its adapter; in `out` if that is given. `h` is the
        adapters' first half where it came with x (kernels/lora_fused.py)."""
        y_TN = self.packed.forward(x_TK, out)
        adapters = self.adapters(lora, layer)
        if adapters is None:
            return y_TN
        if h_MPTR is not None:
            return lora_expand_(y_TN, h_MPTR, *adapters)
        return lora_forward_(y_TN, x_TK, *adapters)

    def backward(
        self,
        dy_WN: torch.Tensor,
        x_WK: Callable[[], torch.Tensor],
        lora: dict[int, ModuleGradient],
        token_offset: int,
    ) -> torch.Tensor:
        """dx [W, K] of dy [W, N]; adds the adapters' gradients. `x_WK` makes the input, asked for only when
        an adapter needs it; `token_offset` is the window's first token's index in its microbatch."""
        dx_WK = self.packed.backward_input(dy_WN)
        self._add_adapter(dy_WN, x_WK, lora, token_offset, dx_WK)
        return dx_WK

    def backward_adapter(
        self,
        dy_WN: torch.Tensor,
        x_WK: Callable[[], torch.Tensor],
        lora: dict[int, ModuleGradient],
        token_offset: int,
    ) -> None:
        """The adapters' gradients as in `backward`, without dx: below, nothing trains."""
        if self.is_adapted(lora):
            self._add_adapter(dy_WN, x_WK, lora, token_offset, dy_WN.new_zeros(len(dy_WN), self.in_features))

    def is_adapted(self, lora: dict[int, ModuleGradient]) -> bool:
        """Some module of this product has an adapter among `lora`."""
        return any(module in lora for module, _ in self.parts)

    @property
    def in_features(self) -> int:
        """K of the merged weight."""
        return self.packed.in_features

    def _add_adapter(
        self,
        dy_WN: torch.Tensor,
        x_WK: Callable[[], torch.Tensor],
        lora: dict[int, ModuleGradient],
        token_offset: int,
        dx_WK: torch.Tensor,
    ) -> None:
        adapted = [lora[m]._replace(column=column) for m, column in self._columns if m in lora]
        if adapted:
            lora_backward(dy_WN, x_WK(), adapted, dx_WK, token_offset)
