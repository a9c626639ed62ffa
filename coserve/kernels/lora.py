"""Low-rank adapters on a batch that mixes them, and their backward (Hu et al. 2021).

An adapter is a set of rows in a pool: for one module of one layer, `a` [rows, K] and `b` [rows, N]
(B transposed, already multiplied by the scale):

    h = x a^T,   y += h b
    dh = dy b^T,   db += h^T dy,   da += dh^T x,   dx += dh a

With dropout (dropout.py) keep * x / (1 - rate) stands for x in h and da, and dx += keep / (1 - rate) (dh a);
the mask is made again in the backward.

h and dh are fp32 sums; with bf16 operands on AVX512-BF16 they are multiplied as two bf16 each, 16 bits of
mantissa in all. Sums over tokens run in tiles of 64 anchored at the microbatch's start, added last to
first, so windows cut at multiples of 64 change no bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
from coserve.kernels.dropout import NO_DROPOUT, Dropout, keep_mask

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


def lora_forward_(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    a_RK: torch.Tensor,
    b_RN: torch.Tensor,
    segments: LoraSegments,
    ranks_S: torch.Tensor,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Add each segment's adapter to `y` [T, N] in place and return it.

    `y` may be a column slice (row stride > N); `x` [T, K], `a`, `b` have its dtype. `ranks` [S] int32
    (stride free) is the module's rank per segment, 0 where the adapter leaves the module alone. `dropout` has
    a key for every token and a rate for every segment; a segment of rate 0 drops nothing.
    """
    native = native_for(y_TN)
    if native is None:
        run = triton_or_reference(y_TN, _lora_forward_reference_)
        return run(y_TN, x_TK, a_RK, b_RN, segments, ranks_S, dropout)
    N, K, dtype = y_TN.shape[1], x_TK.shape[1], y_TN.dtype
    if not (
        x_TK.dtype is dtype
        and a_RK.dtype is dtype
        and b_RN.dtype is dtype
        and y_TN.stride(1) == 1
        and x_TK.stride(1) == 1
        and a_RK.is_contiguous()
        and b_RN.is_contiguous()
        and a_RK.shape[1] == K
        and b_RN.shape[1] == N
        and ranks_S.dtype is torch.int32
        and ranks_S.shape == (segments.count,)
    ):
        _check_forward(y_TN, x_TK, a_RK, b_RN, segments, ranks_S)
    if dropout is not None:
        _check_dropout(dropout, len(x_TK), segments.count)
    native.lora_forward(
        DTYPE_CODES[y_TN.dtype],
        y_TN.data_ptr(),
        y_TN.stride(0),
        x_TK.data_ptr(),
        x_TK.stride(0),
        a_RK.data_ptr(),
        b_RN.data_ptr(),
        *segments.pointers,
        ranks_S.data_ptr(),
        ranks_S.stride(0),
        *(NO_DROPOUT if dropout is None else dropout.arguments),
        segments.count,
        N,
        K,
    )
    return y_TN


def lora_backward(
    dy_TN: torch.Tensor,
    x_TK: torch.Tensor,
    a_RK: torch.Tensor,
    b_RN: torch.Tensor,
    rows: torch.Tensor,
    dx_TK: torch.Tensor,
    da_rK: torch.Tensor | None,
    db_rN: torch.Tensor,
    token_offset: int,
    dropout: Dropout | None = None,
) -> None:
    """Add one adapter's gradients over one window: into `dx` [T, K], and fp32 `da` [r, K], `db` [r, N].

    `rows` [r] int32 are the adapter's pool rows; `db` is w.r.t. the scaled b. The window's first token has
    index `token_offset` in its microbatch. `dy`, `x`, `dx` may be column slices. `dropout` is that of the
    forward: a key for every token of the window, one rate. Without `da` (a frozen A) the rest is the same.
    """
    native = native_for(dy_TN)
    if native is None:
        run = triton_or_reference(dy_TN, _lora_backward_reference)
        return run(dy_TN, x_TK, a_RK, b_RN, rows, dx_TK, da_rK, db_rN, token_offset, dropout)
    (T, N), K, rank = dy_TN.shape, x_TK.shape[1], len(rows)
    require_like(dy_TN, dy=dy_TN, x=x_TK, dx=dx_TK)
    require_like(dy_TN, contiguous=True, a=a_RK, b=b_RN)
    require_index(torch.int32, rows=rows)
    require(a_RK.shape[1] == K and b_RN.shape[1] == N, f"a and b are not [rows, {K}] and [rows, {N}]")
    require(x_TK.shape == (T, K) and dx_TK.shape == (T, K), f"x and dx are not [{T}, {K}]")
    for name, grad, shape in (("da", da_rK, (rank, K)), ("db", db_rN, (rank, N))):
        if grad is not None:
            require(grad.shape == shape, f"{name} is not {list(shape)}")
            require(grad.dtype == torch.float32 and grad.is_contiguous(), f"{name} must be contiguous fp32")
    if dropout is not None:
        _check_dropout(dropout, T, 1)
    native.lora_backward(
        DTYPE_CODES[dy_TN.dtype],
        dy_TN.data_ptr(),
        dy_TN.stride(0),
        x_TK.data_ptr(),
        x_TK.stride(0),
        a_RK.data_ptr(),
        b_RN.data_ptr(),
        rows.data_ptr(),
        rank,
        dx_TK.data_ptr(),
        dx_TK.stride(0),
        0 if da_rK is None else da_rK.data_ptr(),
        db_rN.data_ptr(),
        token_offset,
        *(NO_DROPOUT if dropout is None else dropout.arguments),
        T,
        N,
        K,
    )


def _check_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: LoraSegments,
    ranks: torch.Tensor,
) -> None:
    N, K = y.shape[1], x.shape[1]
    require_like(y, y=y, x=x)
    require_like(y, contiguous=True, a=a, b=b)
    require(a.shape[1] == K and b.shape[1] == N, f"a and b are not [rows, {K}] and [rows, {N}]")
    require(
        ranks.dtype == torch.int32 and ranks.shape == (segments.count,),
        f"ranks is {ranks.dtype} {tuple(ranks.shape)}, expected int32 ({segments.count},)",
    )


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
    if dropout is not None:
        _check_dropout(dropout, len(x), segments.count)
    spans = zip(
        segments.token_start.tolist(),
        segments.token_end.tolist(),
        segments.row_offset.tolist(),
        ranks.tolist(),
        strict=True,
    )
    for index, (start, end, offset, rank) in enumerate(spans):
        if rank == 0 or start == end:
            continue
        rows = segments.rows[offset : offset + rank].long()
        xf = wide(x[start:end])
        if dropout is None:
            h = xf @ wide(a[rows]).t()
        else:
            rate = dropout.rates_S[index]
            keep = keep_mask(dropout.keys_T[start:end], dropout.salt, x.shape[1], rate)
            h = (xf.where(keep, 0) @ wide(a[rows]).t()) * _survivor_factor(rate, xf)
        y[start:end] = (wide(y[start:end]) + h @ wide(b[rows])).to(y.dtype)
    return y


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
