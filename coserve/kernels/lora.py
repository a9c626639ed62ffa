"""Low-rank adapters on a batch that mixes them, and their backward (Hu et al. 2021).

An adapter is a set of rows in a pool: for one module of one layer, `a` [rows, K] and `b` [rows, N]
(B transposed, already multiplied by the scale):

    h = x a^T,   y += h b
    dh = dy b^T,   db += h^T dy,   da += dh^T x,   dx += dh a

With dropout (dropout.py) keep * x / (1 - rate) stands for x in h and da, and dx += keep / (1 - rate) (dh a);
the mask is made again in the backward.

A linear merged of several modules is one call: x is read once for all of them, and dx gets the sum of
their parts, rounded once. h and dh are fp32 sums; with bf16 operands on AVX512-BF16 they are rounded to bf16
as factors of y and dx, and multiplied as two bf16 each, 16 bits of mantissa in all, in da and db. Sums over
tokens run in tiles of 64 anchored at the microbatch's start, added last to first, so windows cut at multiples
of 64 change no bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
    wide,
)
from coserve.kernels.dropout import Dropout, keep_mask

TILE = 64


@dataclass(frozen=True)
class LoraSegments:
    """Runs of tokens that share an adapter; int32 tensors.

    Segment s is tokens token_start[s]:token_end[s] (disjoint, ascending; tokens outside are base's) and the
    pool rows rows[row_offset[s]:], as many of them as the module's rank.
    ValueError for other dtypes or layouts.
    """

    token_start: torch.Tensor
    token_end: torch.Tensor
    row_offset: torch.Tensor
    rows: torch.Tensor
    count: int = field(init=False)
    pointers: tuple[int, int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tables = (self.token_start, self.token_end, self.row_offset, self.rows)
        count = len(self.token_start)
        for name, table in zip(("token_start", "token_end", "row_offset", "rows"), tables, strict=True):
            require(table.dtype == torch.int32 and table.is_contiguous(), f"{name} must be contiguous int32")
            require(
                name == "rows" or len(table) == count, f"{name} has {len(table)} entries, expected {count}"
            )
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "pointers", tuple(table.data_ptr() for table in tables))

    def __len__(self) -> int:
        return self.count


class LoraModule(NamedTuple):
    """One module of a merged product: its rows in the pool, a_RK [rows, K] and b_RN [rows, N], the first of
    its columns in y, its line in the table of ranks, and the salt of its dropout masks."""

    a_RK: torch.Tensor
    b_RN: torch.Tensor
    column: int = 0
    line: int = 0
    salt: int = 0

    @property
    def columns(self) -> slice:
        """Its columns in y."""
        return slice(self.column, self.column + self.b_RN.shape[1])


class LoraGroup:
    """The modules of a merged product, which share x and lie side by side in y; checked once.

    ValueError for tensors that aren't contiguous or alike.
    """

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self.modules = tuple(modules)
        first = self.modules[0].a_RK
        self.dtype, self.in_features = first.dtype, first.shape[1]
        self.width = max(module.columns.stop for module in self.modules)
        self.lines = 1 + max(module.line for module in self.modules)
        for module in self.modules:
            _check_rows(first, self.in_features, module.b_RN.shape[1], module.a_RK, module.b_RN)
        table = [
            (m.a_RK.data_ptr(), m.b_RN.data_ptr(), m.column, m.b_RN.shape[1], m.line, m.salt)
            for m in self.modules
        ]
        self._table = array("q", chain.from_iterable(table))
        self.arguments = self._table.buffer_info()[0], len(table)


class ProductLora(NamedTuple):
    """The adapters on one merged product in a batch: what `lora_forward_` takes behind y and x."""

    group: LoraGroup
    segments: LoraSegments
    ranks_MS: torch.Tensor
    dropout: Dropout | None = None


class ModuleGradient(NamedTuple):
    """One module of a merged product in training: the pool's tensors, the adapter's `rows` in them (int32
    [r]), and the fp32 sums that its gradients are added to, `da_rK` None where A is frozen. `db_rN` is the
    gradient of the scaled, transposed B. `dropout` is that of the window's tokens in this module; `column`
    the first of its columns in dy."""

    a_RK: torch.Tensor
    b_RN: torch.Tensor
    rows: torch.Tensor
    da_rK: torch.Tensor | None
    db_rN: torch.Tensor
    dropout: Dropout | None = None
    column: int = 0


def lora_forward_(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    group: LoraGroup,
    segments: LoraSegments,
    ranks_MS: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Add each segment's adapter to `y` [T, N], the merged product, in place and return it.

    `y` may be a column slice (row stride > N); `x` [T, K] has its dtype. `ranks` int32 [lines, S]: line m
    has each segment's rank in the module of that line, 0 where the adapter leaves it alone. `dropout` has a
    key for every token and a rate for every segment, 0 where nothing is dropped; salts are the modules'.
    """
    native = native_for(y_TN)
    if native is None:
        run = triton_or_reference(y_TN, _lora_forward_reference_)
        for module in group.modules:
            a_RK, b_RN, ranks_S = module.a_RK, module.b_RN, ranks_MS[module.line]
            own = dropout and dropout.salted(module.salt)
            run(y_TN[:, module.columns], x_TK, a_RK, b_RN, segments, ranks_S, own)
        return y_TN
    dtype, (T, K) = group.dtype, x_TK.shape
    if not (
        y_TN.dtype is dtype
        and x_TK.dtype is dtype
        and K == group.in_features
        and y_TN.shape[1] >= group.width
        and y_TN.stride(1) == 1
        and x_TK.stride(1) == 1
        and len(y_TN) == T
        and ranks_MS.dtype is torch.int32
        and ranks_MS.is_contiguous()
        and ranks_MS.shape[1] == segments.count
        and ranks_MS.shape[0] >= group.lines
    ):
        _check_forward(y_TN, x_TK, group, segments, ranks_MS)
    if dropout is not None:
        _check_dropout(dropout, T, segments.count)
    native.lora_forward(
        DTYPE_CODES[dtype],
        y_TN.data_ptr(),
        y_TN.stride(0),
        x_TK.data_ptr(),
        x_TK.stride(0),
        *group.arguments,
        *segments.pointers,
        ranks_MS.data_ptr(),
        *((0, 0) if dropout is None else dropout.pointers),
        segments.count,
        K,
    )
    return y_TN


def lora_expand_(
    y_TN: torch.Tensor,
    h_MPTR: torch.Tensor,
    group: LoraGroup,
    segments: LoraSegments,
    ranks_MS: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """The second half of `lora_forward_`, of an h that came with x (lora_fused.py): fp32 [modules, parts, T,
    R], parts to be added up, set for the tokens and ranks of adapters alone."""
    run = triton_or_reference(y_TN, _lora_expand_reference_)
    for module, h_PTR in zip(group.modules, h_MPTR, strict=True):
        run(y_TN[:, module.columns], h_PTR, module.b_RN, segments, ranks_MS[module.line], dropout)
    return y_TN


def lora_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    modules: Sequence[ModuleGradient],
    dx_TK: torch.Tensor,
    token_offset: int,
) -> None:
    """Add one adapter's gradients over one window of a merged product: into `dx` [T, K], and each module's
    fp32 `da` [r, K], `db` [r, N].

    The window's first token has index `token_offset` in its microbatch. `dy`, `x`, `dx` may be column slices.
    Dropout is that of the forward, for all modules or none: a key for every token of the window, one rate.
    """
    native = native_for(dy_TN)
    if native is None:
        run = triton_or_reference(dy_TN, _lora_backward_reference)
        for a_RK, b_RN, rows, da_rK, db_rN, dropout, column in modules:
            dy = dy_TN[:, column : column + b_RN.shape[1]]
            run(dy, x_TK, a_RK, b_RN, rows, dx_TK, da_rK, db_rN, token_offset, dropout)
        return
    T, K = x_TK.shape
    require_like(dy_TN, dy=dy_TN, x=x_TK, dx=dx_TK)
    require(len(dy_TN) == T and dx_TK.shape == (T, K), f"dy and dx don't fit x of [{T}, {K}]")
    table = array("q")
    for m in modules:
        _check_gradient(m, dy_TN, K)
        table.extend(
            (
                m.a_RK.data_ptr(),
                m.b_RN.data_ptr(),
                m.column,
                m.b_RN.shape[1],
                len(m.rows),
                m.rows.data_ptr(),
                0 if m.da_rK is None else m.da_rK.data_ptr(),
                m.db_rN.data_ptr(),
                0 if m.dropout is None else m.dropout.salt,
            )
        )
    dropout = modules[0].dropout
    require(len({m.dropout is None or m.dropout.pointers for m in modules}) == 1, "modules differ in dropout")
    native.lora_backward(
        DTYPE_CODES[dy_TN.dtype],
        dy_TN.data_ptr(),
        dy_TN.stride(0),
        x_TK.data_ptr(),
        x_TK.stride(0),
        table.buffer_info()[0],
        len(modules),
        dx_TK.data_ptr(),
        dx_TK.stride(0),
        token_offset,
        *((0, 0) if dropout is None else dropout.pointers),
        T,
        K,
    )


def _check_rows(like: torch.Tensor, K: int, N: int, a: torch.Tensor, b: torch.Tensor) -> None:
    require(a.dtype == like.dtype and b.dtype == like.dtype, f"a is {a.dtype}, b {b.dtype}")
    require(a.is_contiguous() and b.is_contiguous(), "a or b is not contiguous")
    require(a.shape[1] == K and b.shape[1] == N, f"a and b are not [rows, {K}] and [rows, {N}]")


def _check_forward(
    y: torch.Tensor, x: torch.Tensor, group: LoraGroup, segments: LoraSegments, ranks: torch.Tensor
) -> None:
    require_like(group.modules[0].a_RK, y=y, x=x)
    require(x.shape[1] == group.in_features, f"x has {x.shape[1]} columns, a and b take {group.in_features}")
    require(y.shape[1] >= group.width, f"y has {y.shape[1]} columns, a and b make {group.width}")
    require(len(x) == len(y), f"{len(x)} rows of x for {len(y)} of y")
    require(
        ranks.dtype == torch.int32
        and ranks.is_contiguous()
        and ranks.shape[1:] == (segments.count,)
        and len(ranks) >= group.lines,
        f"ranks is {ranks.dtype} {tuple(ranks.shape)}, expected int32 ({group.lines}, {segments.count})",
    )


def _check_gradient(m: ModuleGradient, dy: torch.Tensor, K: int) -> None:
    rank, N = len(m.rows), m.b_RN.shape[1]
    _check_rows(dy, K, N, m.a_RK, m.b_RN)
    require(m.column + N <= dy.shape[1], f"a and b make {m.column + N} columns, dy has {dy.shape[1]}")
    require_index(torch.int32, rows=m.rows)
    for name, grad, shape in (("da", m.da_rK, (rank, K)), ("db", m.db_rN, (rank, N))):
        if grad is not None:
            require(grad.shape == shape, f"{name} is not {list(shape)}")
            require(grad.dtype == torch.float32 and grad.is_contiguous(), f"{name} must be contiguous fp32")
    if m.dropout is not None:
        _check_dropout(m.dropout, len(dy), 1)


def _check_dropout(dropout: Dropout, tokens: int, rates: int) -> None:
    keys, given = len(dropout.keys_T), len(dropout.rates_S)
    require(keys == tokens, f"dropout has {keys} keys, expected {tokens}")
    require(given == rates, f"dropout has {given} rates, expected {rates}")


def _lora_forward_reference_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: LoraSegments,
    ranks: torch.Tensor,
    dropout: Dropout | None,
) -> torch.Tensor:
    h = shrink_reference(x, a, segments, ranks, dropout)
    return _lora_expand_reference_(y, h[None], b, segments, ranks, dropout)


def shrink_reference(
    x: torch.Tensor, a: torch.Tensor, segments: LoraSegments, ranks: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    """h [T, R] of one module, R the largest rank."""
    if dropout is not None:
        _check_dropout(dropout, len(x), segments.count)
    h = wide(x).new_zeros(len(x), max(ranks.tolist(), default=0))
    for index, span, rows in _adapted_spans(segments, ranks):
        xf = wide(x[span])
        if dropout is not None:
            keep = keep_mask(dropout.keys_T[span], dropout.salt, x.shape[1], dropout.rates_S[index])
            xf = xf.where(keep, 0)
        h[span, : len(rows)] = xf @ wide(a[rows]).t()
    return h


def _lora_expand_reference_(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    segments: LoraSegments,
    ranks: torch.Tensor,
    dropout: Dropout | None,
) -> torch.Tensor:
    whole = h.sum(0)
    for index, span, rows in _adapted_spans(segments, ranks):
        own = whole[span, : len(rows)]
        if dropout is not None:
            own = own * _survivor_factor(dropout.rates_S[index], own)
        y[span] = (wide(y[span]) + own @ wide(b[rows])).to(y.dtype)
    return y


def _adapted_spans(
    segments: LoraSegments, ranks: torch.Tensor
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(number, tokens, rows of the pool) of each segment that has both."""
    starts, ends, offsets = (
        table.tolist() for table in (segments.token_start, segments.token_end, segments.row_offset)
    )
    for index, rank in enumerate(ranks.tolist()):
        if rank and starts[index] < ends[index]:
            rows = segments.rows[offsets[index] : offsets[index] + rank].long()
            yield index, slice(starts[index], ends[index]), rows


def _lora_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    dx: torch.Tensor,
    da: torch.Tensor | None,
    db: torch.Tensor,
    token_offset: int,
    dropout: Dropout | None,
) -> None:
    af, bf = wide(a[rows.long()]), wide(b[rows.long()])
    keep, factor = None, None
    if dropout is not None:
        _check_dropout(dropout, len(x), 1)
        keep = keep_mask(dropout.keys_T, dropout.salt, x.shape[1], dropout.rates_S[0])
        factor = _survivor_factor(dropout.rates_S[0], af)
    end = token_offset + len(x)
    for tile in reversed(range(token_offset // TILE, -(-end // TILE))):
        first, last = max(tile * TILE, token_offset), min((tile + 1) * TILE, end)
        span = slice(first - token_offset, last - token_offset)
        xf, dyf = wide(x[span]), wide(dy[span])
        if keep is not None:
            xf = xf.where(keep[span], 0)
        h, dh = xf @ af.t(), dyf @ bf.t()
        if factor is not None:
            h, dh = h * factor, dh * factor
        db += h.t() @ dyf
        if da is not None:
            da += dh.t() @ xf
        into_dx = dh @ af if keep is None else (dh @ af).where(keep[span], 0)
        dx[span] = (wide(dx[span]) + into_dx).to(dx.dtype)


def _survivor_factor(rate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (1.0 / (1.0 - rate)).to(like.dtype)
