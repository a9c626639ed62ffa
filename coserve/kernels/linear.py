"""A frozen linear layer with its weight packed once: y = x W^T + b and dx = dy W.

On the CPU in fp32 a row's result does not depend on how many rows its batch has: each element sums 256
ascending k at a time in one chain of multiply-adds and adds those sums in order, whatever the tile or the
thread. In bf16 the CPU uses oneDNN's prepacked product, elsewhere torch's linear. dx in bf16 reads the raw
weight: by a kernel of our own where the CPU has AVX512-BF16 and no AMX, else by torch's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coserve.kernels.dispatch import has_pair_dots, native_for, require

COLUMN_STEP = 16
ONEDNN_PACK_ROWS = 64


class PackedLinear:
    """Weight [N, K] (fp32 or bf16) and optional bias [N], both frozen.

    The raw weight is kept (it may be the embedding's storage) and must not change after construction.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N
        self.out_features, self.in_features = weight_NK.shape
        if bias_N is not None:
            require(
                bias_N.shape == (self.out_features,)
                and bias_N.dtype == weight_NK.dtype
                and bias_N.is_contiguous(),
                f"bias must be contiguous [{self.out_features}] of {weight_NK.dtype}",
            )
        self._pack: torch.Tensor | None = None
        self._transposed_pack: torch.Tensor | None = None
        self._onednn_pack: torch.Tensor | None = None
        self._own_gradient = (
            weight_NK.dtype == torch.bfloat16
            and weight_NK.is_cpu
            and weight_NK.is_contiguous()
            and self.out_features % 2 == 0
            and not torch.cpu._is_amx_tile_supported()
        )
        if weight_NK.dtype == torch.float32 and native_for(weight_NK):
            self._pack = _pack(weight_NK)
        elif weight_NK.dtype == torch.bfloat16 and weight_NK.is_cpu and _onednn_takes_bf16():
            self._onednn_pack = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), ONEDNN_PACK_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the bias and the packs made so far."""
        held = (self.weight, self.bias, self._pack, self._transposed_pack, self._onednn_pack)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """y [T, N] of x [T, K], in x's dtype, which is the weight's; x's row stride is free."""
        if self._pack is not None and native_for(x_TK):
            return _linear(x_TK, self._pack, self.out_features, self.in_features, self.bias)
        if self._onednn_pack is not None and len(x_TK):
            return torch.ops.mkldnn._linear_pointwise(x_TK, self._onednn_pack, self.bias, "none", [], "")
        return F.linear(x_TK, self.weight, self.bias)

    def backward_input(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, K] of dy [T, N], in dy's dtype."""
        if self._pack is not None and native_for(dy_TN):
            if self._transposed_pack is None:
                self._transposed_pack = _pack(self.weight.t())
            return _linear(dy_TN, self._transposed_pack, self.in_features, self.out_features, None)
        if self._own_gradient and has_pair_dots() and native_for(dy_TN) and dy_TN.stride(1) == 1:
            return _input_gradient(dy_TN, self.weight)
        return dy_TN @ self.weight


def _onednn_takes_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _input_gradient(dy_TN: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    native = native_for(dy_TN)
    assert native is not None
    (T, width), (N, K) = dy_TN.shape, weight_NK.shape
    given = f"{dy_TN.dtype} [T, {width}]"
    require(width == N and dy_TN.dtype is torch.bfloat16, f"dy is {given}, expected bf16 [T, {N}]")
    dx_TK = torch.empty((T, K), dtype=torch.bfloat16)
    native.linear_input_gradient(
        dy_TN.data_ptr(), dy_TN.stride(0), T, weight_NK.data_ptr(), N, K, dx_TK.data_ptr(), K
    )
    return dx_TK


def _pack(weight_NK: torch.Tensor) -> torch.Tensor:
    N, K = weight_NK.shape
    pack = torch.empty(K * -(-N // COLUMN_STEP) * COLUMN_STEP, dtype=torch.float32)
    native = native_for(pack)
    assert native is not None
    native.pack(weight_NK.data_ptr(), weight_NK.stride(0), weight_NK.stride(1), N, K, pack.data_ptr())
    return pack


def _linear(x: torch.Tensor, pack: torch.Tensor, N: int, K: int, bias: torch.Tensor | None) -> torch.Tensor:
    native = native_for(x)
    assert native is not None
    M, width = x.shape
    if width != K or x.dtype is not torch.float32 or x.stride(1) != 1:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}, "
            f"expected fp32 [T, {K}] with contiguous rows"
        )
    y = torch.empty((M, N), dtype=torch.float32)
    bias_pointer = 0 if bias is None else bias.data_ptr()
    native.linear(x.data_ptr(), x.stride(0), M, pack.data_ptr(), N, K, bias_pointer, y.data_ptr(), N)
    return y
