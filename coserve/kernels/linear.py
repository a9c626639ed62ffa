"""A frozen linear layer on the one packed copy of its weight: y = x W^T + b and dx = dy W.

On the CPU in fp32 and bf16 the weight lies in panels of 16 of its rows (csrc/weight_pack.h) that serve both
products, lookups of rows too, and no other copy is kept. A row's result does not depend on how many rows its
batch has: each element is one chain over ascending k (fp32: sums of 256 k each, added in order), whatever the
tile or the thread. On other devices, in float64 and without the compiled module the weight lies as it came
and torch multiplies; on CUDA with --deterministic the Triton kernel, whose rows keep their bits too.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from coserve.kernels import dispatch
from coserve.kernels.dispatch import DTYPE_CODES, native_for, require, triton_or_reference

PANEL = 16  # rows of the weight
PAIR_STEP = 32  # columns of a bf16 weight that a panel's depth is filled up to
HUGE_PAGE = 2 << 20
CONVERTED_AT_ONCE = 4 << 20  # elements
PART = 1 << 30  # products of a piece of one multiplication: some milliseconds of two cores
LEAST_ROWS = 32  # of a piece: narrower ones read the weight too often


class PackedLinear:
    """Weight [N, K] and optional bias [N], both frozen, in `dtype` on `device` (default: the weight's).

    A sequence of weights is taken as one, their rows in that order. What is given is copied: a mapped file
    may go away.
    """

    def __init__(
        self,
        weight_NK: torch.Tensor | Sequence[torch.Tensor],
        bias_N: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        parts = [weight_NK] if isinstance(weight_NK, torch.Tensor) else list(weight_NK)
        self.dtype, self.device = dtype or parts[0].dtype, torch.device(device or parts[0].device)
        self.out_features, self.in_features = sum(map(len, parts)), parts[0].shape[1]
        self.bias = bias_N
        if bias_N is not None:
            require(
                bias_N.shape == (self.out_features,)
                and bias_N.dtype == self.dtype
                and bias_N.is_contiguous(),
                f"bias must be contiguous [{self.out_features}] of {self.dtype}",
            )
        self._weight: torch.Tensor | None = None
        self._pack: torch.Tensor | None = None
        if native_for(torch.empty(0, dtype=self.dtype, device=self.device)):
            self._pack = _zeros(_pack_elements(self.out_features, self.in_features, self.dtype), self.dtype)
        else:
            self._weight = torch.empty(
                (self.out_features, self.in_features), dtype=self.dtype, device=self.device
            )
        first = 0
        for part_NK in parts:
            self.fill(first, part_NK)
            first += len(part_NK)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight as it is held, its padding included."""
        held = self._weight if self._pack is None else self._pack
        assert held is not None
        return held.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias."""
        return self.weight_nbytes + (0 if self.bias is None else self.bias.nbytes)

    def fill(self, first: int, weight_nK: torch.Tensor) -> None:
        """Write rows [first, first + n) of the weight; other floats are converted a few rows at a time."""
        if self._pack is None:
            assert self._weight is not None
            self._weight[first : first + len(weight_nK)] = weight_nK
            return
        K = self.in_features
        require(weight_nK.shape[1] == K, f"the weight has {weight_nK.shape[1]} columns, expected {K}")
        ready = weight_nK.dtype == self.dtype and weight_nK.stride(1) == 1 and weight_nK.is_cpu
        step = len(weight_nK) if ready else max(PANEL, CONVERTED_AT_ONCE // max(K, 1) // PANEL * PANEL)
        for start in range(0, len(weight_nK), max(step, 1)):
            rows = weight_nK[start : start + step]
            rows = rows if ready else rows.to(device="cpu", dtype=self.dtype).contiguous()
            code = DTYPE_CODES[self.dtype]
            assert dispatch.native is not None
            dispatch.native.pack_weight(
                code, rows.data_ptr(), rows.stride(0), first + start, len(rows), K, self._pack.data_ptr()
            )

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows [T, K] of the weight, of int64 ids that all lie inside it."""
        if self._pack is None:
            assert self._weight is not None
            return self._weight.index_select(0, ids_T)
        ids_T = ids_T.contiguous()
        require(ids_T.dtype == torch.int64 and ids_T.is_cpu, f"ids are {ids_T.dtype} on {ids_T.device}")
        rows_TK = torch.empty((len(ids_T), self.in_features), dtype=self.dtype)
        code = DTYPE_CODES[self.dtype]
        assert dispatch.native is not None
        dispatch.native.gather_rows(
            code, self._pack.data_ptr(), self.in_features, ids_T.data_ptr(), len(ids_T), rows_TK.data_ptr()
        )
        return rows_TK

    def unpacked(self) -> torch.Tensor:
        """The weight [N, K]: a copy where it is packed. For tests, files and the references."""
        if self._pack is None:
            assert self._weight is not None
            return self._weight
        return self.rows(torch.arange(self.out_features))

    def forward(self, x_TK: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """y [T, N] of x [T, K], in x's dtype, which is the weight's; x's row stride is free. y is `out`,
        contiguous, if that is given."""
        if self._pack is not None and native_for(x_TK):
            return self._multiply(x_TK, "x", self.in_features, self.out_features, transposed=False, y=out)
        if dispatch.batch_invariant():
            y_TN = triton_or_reference(x_TK, _linear_reference)(x_TK, self.unpacked(), self.bias)
        else:
            y_TN = F.linear(x_TK, self.unpacked(), self.bias)
        return y_TN if out is None else out.copy_(y_TN)

    def backward_input(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, K] of dy [T, N], in dy's dtype, which is the weight's; dy's row stride is free."""
        if self._pack is not None and native_for(dy_TN):
            return self._multiply(dy_TN, "dy", self.out_features, self.in_features, transposed=True)
        if dispatch.batch_invariant():
            return triton_or_reference(dy_TN, _input_gradient_reference)(dy_TN, self.unpacked())
        return dy_TN @ self.unpacked()

    def column_parts(self, rows: int) -> list[slice]:
        """Parts of y's columns that `forward_columns` makes one by one, in some milliseconds each; all of
        them where the weight isn't packed, as a part might have other bits there."""
        products = max(rows, 1) * self.in_features
        step = self.out_features if self._pack is None else max(PART // products // PANEL, 1) * PANEL
        return [slice(first, first + step) for first in range(0, self.out_features, step)]

    def row_parts(self, rows: int) -> list[slice]:
        """Parts of dy's rows for `backward_input`, likewise, that don't read the weight too often."""
        size = self.out_features * self.in_features
        step = max(rows, 1) if self._pack is None else max(PART // size, LEAST_ROWS)
        return [slice(first, first + step) for first in range(0, rows, step)]

    def forward_columns(self, x_TK: torch.Tensor, y_TN: torch.Tensor, columns: slice) -> None:
        """One of the `column_parts` of `y` [T, N], contiguous, with the bits of `forward`."""
        if self._pack is None or not native_for(x_TK):
            y_TN[:, columns] = self.forward(x_TK)[:, columns]
            return
        self._check(x_TK, "x", self.in_features)
        fits = y_TN.shape == (len(x_TK), self.out_features) and y_TN.dtype is self.dtype
        require(fits and y_TN.is_contiguous(), f"y is not contiguous {self.dtype} [T, {self.out_features}]")
        first, count = columns.start, min(columns.stop, self.out_features) - columns.start
        pack, item = self._pack[_pack_elements(first, self.in_features, self.dtype) :], y_TN.element_size()
        bias = 0 if self.bias is None else self.bias[first:].data_ptr()
        assert dispatch.native is not None
        dispatch.native.linear(
            DTYPE_CODES[self.dtype], False, x_TK.data_ptr(), x_TK.stride(0), len(x_TK), pack.data_ptr(),
            count, self.in_features, bias, y_TN.data_ptr() + first * item, self.out_features,
        )  # fmt: skip

    def _check(self, x: torch.Tensor, name: str, into: int) -> None:
        if x.shape[1] != into or x.dtype is not self.dtype or (x.stride(1) != 1 and into > 1):
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}, "
                f"expected {self.dtype} [T, {into}] with contiguous rows"
            )

    def _multiply(
        self,
        x: torch.Tensor,
        name: str,
        into: int,
        out: int,
        transposed: bool,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pack = self._pack
        assert pack is not None and dispatch.native is not None
        M = len(x)
        self._check(x, name, into)
        if y is None:
            y = torch.empty((M, out), dtype=self.dtype)
        else:
            fits = y.shape == (M, out) and y.dtype is self.dtype and y.is_contiguous()
            require(fits, f"out is not contiguous {self.dtype} of shape {(M, out)}")
        bias = 0 if transposed or self.bias is None else self.bias.data_ptr()
        dispatch.native.linear(
            DTYPE_CODES[self.dtype], transposed, x.data_ptr(), x.stride(0), M, pack.data_ptr(),
            self.out_features, self.in_features, bias, y.data_ptr(), out,
        )  # fmt: skip
        return y


def _pack_elements(N: int, K: int, dtype: torch.dtype) -> int:
    depth = K if dtype == torch.float32 else -(-K // PAIR_STEP) * PAIR_STEP
    return -(-N // PANEL) * PANEL * depth


def _zeros(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeroed memory, in huge pages where the system gives them: streaming it misses the TLB less."""
    nbytes = elements * dtype.itemsize
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(elements, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _linear_reference(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x_TK, weight_NK, bias_N)


def _input_gradient_reference(dy_TN: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    return dy_TN @ weight_NK
