"""What the attention kernels share: scores of a tile of rows, and an online softmax over blocks of keys.

A tile's rows are queries of one KV head, token-major: row r is head r % GROUP of token r // GROUP. Scores are
kept in powers of two. Keys come in blocks of BLOCK_N anchored at key 0; a block that a row does not see
leaves the row's bits as they were, so a row's result is that of its own keys alone (Dao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.triton.elementary import tanh
from coserve.kernels.triton.support import next_power_of_2
from coserve.kernels.triton.tuning import Tuned

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = (64, 128, 256)  # padded head dims that have settings of their own


Blocks = Mapping[int, tuple[int, int, int, int]]
Example = Callable[[torch.device, int], Callable[[], Any]]


def tuned_by_dim(name: str, blocks: Blocks, wide: Blocks, example: Example) -> dict[tuple[int, bool], Tuned]:
    """Settings by (padded head dim, fp32): `blocks`, for fp32 `wide`: BLOCK_M, BLOCK_N, warps, stages.

    Other blocks of keys group a row's sums otherwise: the table decides on bits, a batch never does.
    `example(device, head dim)` is what the tuning bench calls.
    """
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    tried = [
        dict(zip(names, values, strict=True)) for values in product((32, 64), (32, 64), (4, 8), (1, 2, 3))
    ]
    return {
        (dim, is_wide): Tuned(
            f"{name}_{dim}{'_fp32' * is_wide}",
            dict(zip(names, values, strict=True)),
            () if is_wide else tuple(tried),
            None if is_wide else partial(_of_dim, example, dim),
        )
        for is_wide, table in ((False, blocks), (True, wide))
        for dim, values in table.items()
    }


def _of_dim(example: Example, dim: int, device: torch.device) -> Callable[[], Any]:
    return example(device, dim)


def settings_for(tuned: Mapping[tuple[int, bool], Tuned], x_TND: torch.Tensor, group: int) -> dict[str, int]:
    """What a launch on heads like x's takes by keyword; a tile has room for one token's heads."""
    D = x_TND.shape[2]
    padded = max(16, next_power_of_2(D))
    kind = next(dim for dim in HEAD_DIMS if dim >= min(padded, HEAD_DIMS[-1]))
    settings = dict(tuned[kind, x_TND.dtype == torch.float32].on(x_TND.device))
    settings["BLOCK_M"] = max(settings["BLOCK_M"], next_power_of_2(group))
    return settings | {"GROUP": group, "D": D, "D_PADDED": padded}


@triton.jit
def scores_of(products, scale, soft_cap, CAPPED: tl.constexpr):
    """(scores in powers of two, slope): the slope is d score / d product, in natural units."""
    if CAPPED:
        turned = tanh(products * (scale / soft_cap))
        return turned * (soft_cap * LOG2E), scale * (1.0 - turned * turned)
    else:
        return products * (scale * LOG2E), tl.full(products.shape, scale, tl.float32)


@triton.jit
def rows_of_keys(key_N, live_N, table_ptr, block_stride, row_stride, BLOCK_SIZE: tl.constexpr):
    """Offsets of the keys' rows: through a block table, or along a stream where BLOCK_SIZE is 0."""
    if BLOCK_SIZE == 0:
        return key_N.to(tl.int64) * row_stride
    else:
        block_N = tl.load(table_ptr + key_N // BLOCK_SIZE, mask=live_N, other=0).to(tl.int64)
        return block_N * block_stride + (key_N % BLOCK_SIZE) * row_stride


@triton.jit
def common_gap(gap_M, gap_end_M, BLOCK_N: tl.constexpr, GAPS: tl.constexpr):
    """(first, number) of the keys in whole blocks that lie in the gaps of all rows."""
    if GAPS:
        first = tl.cdiv(tl.max(gap_M, 0), BLOCK_N) * BLOCK_N
        return first, tl.maximum(tl.min(gap_end_M, 0) // BLOCK_N * BLOCK_N - first, 0)
    else:
        return 0, 0


@triton.jit
def seen(key, first, last, gap, gap_end, GAPS: tl.constexpr):
    """Whether a query sees the key: from its first to its last, but for those in its gap."""
    visible = (key >= first) & (key <= last)
    if GAPS:
        visible = visible & ((key < gap) | (key >= gap_end))
    return visible


@triton.jit
def attend(
    q_MD,
    first_M,
    last_M,
    begin,
    end,
    k_ptr,
    v_ptr,
    table_ptr,
    k_block_stride,
    v_block_stride,
    k_stride,
    v_stride,
    scale,
    soft_cap,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    gap_M,
    gap_end_M,
    GAPS: tl.constexpr,
):
    """(top, total, unnormalised output) of rows that see keys first .. last, over keys begin .. end - 1; with
    GAPS but for those in gap .. gap_end - 1.

    `begin` is a multiple of BLOCK_N; k_ptr and v_ptr point at the KV head of key row 0.
    """
    d_D = tl.arange(0, q_MD.shape[1])
    top_M = tl.full((q_MD.shape[0],), float("-inf"), tl.float32)
    total_M = tl.zeros((q_MD.shape[0],), tl.float32)
    o_MD = tl.zeros(q_MD.shape, tl.float32)
    skip_from, skip = common_gap(gap_M, gap_end_M, BLOCK_N, GAPS)
    for step in range(begin, end - skip, BLOCK_N):
        start = step
        if GAPS:
            start += tl.where(step >= skip_from, skip, 0)
        key_N = start + tl.arange(0, BLOCK_N)
        live_N = key_N < end
        mask_ND = live_N[:, None]
        if D < q_MD.shape[1]:
            mask_ND = mask_ND & (d_D < D)[None, :]
        k_row_N = rows_of_keys(key_N, live_N, table_ptr, k_block_stride, k_stride, BLOCK_SIZE)
        k_ND = tl.load(k_ptr + k_row_N[:, None] + d_D[None, :], mask=mask_ND, other=0.0)
        products_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        scores_MN, _ = scores_of(products_MN, scale, soft_cap, CAPPED)
        seen_MN = seen(
            key_N[None, :], first_M[:, None], last_M[:, None], gap_M[:, None], gap_end_M[:, None], GAPS
        )
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        now_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        base_M = tl.where(now_M == float("-inf"), 0.0, now_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
        v_row_N = rows_of_keys(key_N, live_N, table_ptr, v_block_stride, v_stride, BLOCK_SIZE)
        v_ND = tl.load(v_ptr + v_row_N[:, None] + d_D[None, :], mask=mask_ND, other=0.0)
        o_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, o_MD * shrink_M[:, None], input_precision="ieee")
        top_M = now_M
    return top_M, total_M, o_MD


@triton.jit
def join(top_M, total_M, o_MD, top_new_M, total_new_M, o_new_MD):
    """Two parts of the same rows' softmax as one. Fused multiply-adds are written out, so that every kernel
    that joins parts in this order gets the same bits."""
    now_M = tl.maximum(top_M, top_new_M)
    base_M = tl.where(now_M == float("-inf"), 0.0, now_M)
    old_M, new_M = tl.exp2(top_M - base_M), tl.exp2(top_new_M - base_M)
    total_M = tl.fma(total_M, old_M, total_new_M * new_M)
    o_MD = tl.fma(o_MD, tl.broadcast_to(old_M[:, None], o_MD.shape), o_new_MD * new_M[:, None])
    return now_M, total_M, o_MD
