"""A frozen linear layer with its weight packed once: y = x W^T + b and dx = dy W.

On the CPU in fp32 a row's result does not depend on how many rows its batch has (fixed order of sums over
K). In bf16 the CPU uses oneDNN's prepacked product, elsewhere torch's linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class PackedLinear:
    """Weight [N, K] (fp32 or bf16) and optional bias [N], both frozen.

    The raw weight is kept (it may be the embedding's storage) and must not change after construction.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N
        self.out_features, self.in_features = weight_NK.shape
        self._onednn_pack: torch.Tensor | None = None
        if weight_NK.is_cpu and weight_NK.dtype == torch.bfloat16:
            self._onednn_pack = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), 64)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the bias and the packs made so far."""
        packed = self._onednn_pack.nbytes if self._onednn_pack is not None else 0
        return self.weight.nbytes + packed + (self.bias.nbytes if self.bias is not None else 0)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """y [T, N] of x [T, K], in x's dtype."""
        if self._onednn_pack is not None and len(x_TK):
            return torch.ops.mkldnn._linear_pointwise(x_TK, self._onednn_pack, self.bias, "none", [], "")
        return F.linear(x_TK, self.weight, self.bias)

    def backward_input(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, K] of dy [T, N], in dy's dtype."""
        return dy_TN @ self.weight
