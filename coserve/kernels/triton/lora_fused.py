"""RMS norm or gated activation and the shrink of the LoRA behind it, in one launch.

    y = norm(x) or act(gate) * up,   h_m = y a_m^T  for up to three modules m that read y

for layers that would otherwise write y and read it again for h: a program makes its tokens' piece of y and
projects it while the cache has it. Tiles follow the segments as in lora_shrink.py; further programs take the
tokens between them and only make y. h goes to `lora_expand_` of lora.py. Its parts and bits are the shrink's;
a norm's sum of squares runs over other lanes than rms_norm.py's, so y may differ in its last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraGroup, LoraModule, LoraSegments
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.dropout import threshold_of
from coserve.kernels.triton.lora_shrink import (
    DROPOUT_TYPES,
    MANY_PROGRAMS,
    PART,
    TABLE_TYPES,
    check_tables,
    find_tile,
    hidden_width,
    project_part,
    tables,
    tile_capacity,
)
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense, require_same
from coserve.kernels.triton.swiglu import _activate
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Any:
    x, w, a = (torch.randn(*size, 4096, device=device, dtype=torch.bfloat16) for size in ((64,), (), (64,)))
    own = [torch.arange(4, device=device, dtype=torch.int32) * 16 + shift for shift in (0, 16, 0)]
    segments = LoraSegments(*own, torch.arange(64, device=device, dtype=torch.int32))
    group = LoraGroup([LoraModule(a, a, 4096 * m, m) for m in range(MODULES)])
    ranks = torch.full((MODULES, 4), 16, device=device, dtype=torch.int32)
    return lambda: rms_norm_shrink(x, x, w, 1e-6, group, segments, ranks)


MODULES = 3
LANES = 64  # features at a time of what makes y; a row's squares are added lane by lane
# More warps may add the lanes in another order; TOKENS stays, as in lora_shrink.py.
CANDIDATES = tuple(
    {"TOKENS": 16, "BLOCK_K": k, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}
    for k in (64, 128)
    for r in (16, 32)
    for warps in (4, 8)
    for stages in (2, 3)
)
DEFAULT = {"TOKENS": 16, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3}
TUNED = Tuned("lora_fused", DEFAULT, CANDIDATES, _example)


@triton.jit
def _added(x, residual, at, inside, ADDS: tl.constexpr):
    """x, or the sum of both rounded to their type; fp32."""
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(
            value.dtype
        )
    return value.to(tl.float32)


@triton.jit
def _norm_piece(
    x, residual, w, r, total, y, rows, live, begin, end, K,
    ADDS: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y, and total with ADDS, over columns [begin, end)."""
    dtype = y.dtype.element_ty
    for k0 in tl.range(begin, end, LANES, num_stages=4):
        k = k0 + tl.arange(0, LANES)
        inside, at = live[:, None] & (k < end)[None, :], rows * K + k[None, :]
        value = _added(x, residual, at, inside, ADDS)
        if ADDS:
            tl.store(total + at, value.to(dtype), mask=inside)
        weight = tl.load(w + k, mask=k < end, other=0.0).to(tl.float32)[None, :]
        normed = value * r[:, None]
        if not WIDE:
            normed = normed.to(dtype).to(tl.float32)
        tl.store(y + at, (normed * weight).to(dtype), mask=inside)


@triton.jit
def _activation_piece(x, y, rows, live, begin, end, K, SILU: tl.constexpr, LANES: tl.constexpr):
    """y over columns [begin, end); x is gate and up, [T, 2K]."""
    for k0 in tl.range(begin, end, LANES, num_stages=4):
        k = k0 + tl.arange(0, LANES)
        inside = live[:, None] & (k < end)[None, :]
        gate = tl.load(x + rows * 2 * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + (rows * 2 + 1) * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        activated, _ = _activate(gate, SILU)
        tl.store(y + rows * K + k[None, :], (activated * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _module(
    y, t, live, a, h, part_stride, rank, own_rows, keys, salt, threshold, K, R,
    APART: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        r_live = r < rank
        row = tl.load(own_rows + r, mask=r_live, other=0)
        project_part(
            y, K, t, live, a, row, r_live, keys, salt, threshold, tl.program_id(1), K,
            h + t.to(tl.int64)[:, None] * R + r[None, :], part_stride, live[:, None] & r_live[None, :],
            APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "part_stride", "capacity", "T", "salt0", "salt1", "salt2"])
def fused_shrink_kernel(
    x, residual, w, eps, total, y, a0, a1, a2, line0, line1, line2, salt0, salt1, salt2, h, part_stride,
    token_start, token_end, row_offset, rows, ranks, line_stride, count, keys, rates, capacity, T, K, R,
    NORMS: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, MODULES: tl.constexpr,
    SEGMENTS: tl.constexpr, DROPS: tl.constexpr, APART: tl.constexpr, PART: tl.constexpr,
    LANES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x [T, K], or [T, 2K] for an activation, to y [T, K] and h fp32 [MODULES, parts, T, R]. Programs by
    tiles of tokens, `capacity` for the segments' and then some for nobody's; with APART by parts of K too."""
    tile = tl.program_id(0)
    if tile < capacity:
        # A segment with tokens has an end above 0, so its end stands for the rank that asks for tiles.
        segment, first, end, _ = find_tile(
            token_start, token_end, token_end, 1, count, tile, SEGMENTS, TOKENS
        )
        t = first + tl.arange(0, TOKENS)
        live = t < end
    else:
        segment = tile * 0
        t = (tile - capacity) * TOKENS + tl.arange(0, TOKENS)
        s = tl.arange(0, SEGMENTS)
        start = tl.load(token_start + s, mask=s < count, other=0)
        end_s = tl.load(token_end + s, mask=s < count, other=0)
        taken = (t[:, None] >= start[None, :]) & (t[:, None] < end_s[None, :])
        live = (t < T) & (tl.sum(taken.to(tl.int32), 1) == 0)
    if tl.sum(live.to(tl.int32), 0) == 0:
        return
    begin, end_k = 0, K
    if APART:
        begin = tl.program_id(1) * PART
        end_k = tl.minimum(begin + PART, K)
    rows_of = t.to(tl.int64)[:, None]
    if NORMS:
        squares = tl.zeros((TOKENS, LANES), tl.float32)
        for k0 in tl.range(0, K, LANES, num_stages=4):
            k = k0 + tl.arange(0, LANES)
            inside = live[:, None] & (k < K)[None, :]
            value = _added(x, residual, rows_of * K + k[None, :], inside, ADDS)
            squares += value * value
        r = tl.rsqrt(tl.sum(squares, 1) / K + eps)
        _norm_piece(x, residual, w, r, total, y, rows_of, live, begin, end_k, K, ADDS, WIDE, LANES)
    else:
        _activation_piece(x, y, rows_of, live, begin, end_k, K, SILU, LANES)
    tl.debug_barrier()  # y is read back below, by other threads
    if tile < capacity:
        own_rows = rows + tl.load(row_offset + segment)
        threshold = 0
        if DROPS:
            threshold = threshold_of(tl.load(rates + segment))
        module_stride = tl.num_programs(1) * part_stride
        _module(
            y, t, live, a0, h, part_stride, tl.load(ranks + line0 * line_stride + segment), own_rows, keys,
            salt0, threshold, K, R, APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
        )  # fmt: skip
        if MODULES > 1:
            _module(
                y, t, live, a1, h + module_stride, part_stride,
                tl.load(ranks + line1 * line_stride + segment), own_rows, keys, salt1, threshold, K, R,
                APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
            )  # fmt: skip
        if MODULES > 2:
            _module(
                y, t, live, a2, h + 2 * module_stride, part_stride,
                tl.load(ranks + line2 * line_stride + segment), own_rows, keys, salt2, threshold, K, R,
                APART, PART, TOKENS, BLOCK_K, BLOCK_R, DROPS,
            )  # fmt: skip


def rms_norm_shrink(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    w_H: torch.Tensor,
    eps: float,
    group: LoraGroup,
    segments: LoraSegments,
    ranks_MS: torch.Tensor,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(norm(s), s, h) of s = x + residual, or x, [T, H], in fp32 or 16 bits, the weight in that or fp32; h
    fp32 [modules of the group, parts, T, R], set for the tokens and ranks of adapters alone."""
    y_TH = torch.empty_like(x_TH)
    total_TH = x_TH if residual_TH is None else torch.empty_like(x_TH)
    if residual_TH is not None:
        require_same(x_TH, residual=residual_TH)
        require_dense(residual=residual_TH)
        require(
            residual_TH.shape == x_TH.shape, f"residual {tuple(residual_TH.shape)}, x {tuple(x_TH.shape)}"
        )
    require(w_H.dtype in (x_TH.dtype, torch.float32) and w_H.device == x_TH.device, f"w is {w_H.dtype}")
    require(w_H.shape == x_TH.shape[1:], f"w has shape {tuple(w_H.shape)}, expected ({x_TH.shape[1]},)")
    how = {
        "NORMS": True,
        "ADDS": residual_TH is not None,
        "WIDE": w_H.dtype != x_TH.dtype,
        "SILU": False,
    }
    given = x_TH, residual_TH, w_H, eps, total_TH
    return y_TH, total_TH, _launch(given, y_TH, group, segments, ranks_MS, dropout, how)


def swiglu_shrink(
    gate_up_T2I: torch.Tensor,
    act: str,
    group: LoraGroup,
    segments: LoraSegments,
    ranks_MS: torch.Tensor,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) of y = act(gate) * up [T, I]; h fp32 [modules of the group, parts, T, R] as above."""
    T, double = gate_up_T2I.shape
    require(double % 2 == 0, f"gate_up has {double} columns, expected an even number")
    y_TI = gate_up_T2I.new_empty(T, double // 2)
    how = {"NORMS": False, "ADDS": False, "WIDE": False, "SILU": act == "silu"}
    given = gate_up_T2I, None, None, 0.0, None
    return y_TI, _launch(given, y_TI, group, segments, ranks_MS, dropout, how)


def _launch(
    given: tuple[Any, ...],
    y: torch.Tensor,
    group: LoraGroup,
    segments: LoraSegments,
    ranks: torch.Tensor,
    dropout: Dropout | None,
    how: dict[str, bool],
) -> torch.Tensor:
    (T, K), S, settings, count = y.shape, segments.count, TUNED.on(y.device), len(group.modules)
    require_dense(x=given[0], ranks=ranks)
    require(group.dtype == y.dtype, f"a and b are {group.dtype}, expected {y.dtype}")
    require(group.in_features == K, f"a has {group.in_features} columns, expected {K}")
    require(count <= MODULES, f"{count} modules, at most {MODULES} share an input")
    require(len(ranks) >= group.lines, f"ranks has {len(ranks)} lines, expected {group.lines}")
    check_tables(y.device, segments, ranks[0], dropout, T)
    capacity, parts = tile_capacity(T, S, settings["TOKENS"]), cdiv(K, PART)
    apart = parts > 1 and capacity < MANY_PROGRAMS
    shape = (count, parts if apart else 1, T, hidden_width(segments))
    h = torch.empty(shape, dtype=torch.float32, device=y.device)
    if T == 0:
        return h
    three = [*group.modules, *(group.modules[-1],) * (MODULES - count)]
    drops = (None, None) if dropout is None else (dropout.keys_T, dropout.rates_S)
    fused_shrink_kernel[(capacity + cdiv(T, settings["TOKENS"]), shape[1])](
        *given, y, *(m.a_RK for m in three), *(m.line for m in three), *(m.salt for m in three),
        h, h.stride(1), *tables(segments), ranks, ranks.stride(0), S, *drops, capacity, T, K, shape[3],
        MODULES=count, SEGMENTS=next_power_of_2(S), DROPS=dropout is not None, APART=apart, PART=PART,
        LANES=LANES, **how, **settings,
    )  # fmt: skip
    return h


def _cases() -> list[AotCase]:
    cases = []
    numbers = {"part_stride": "i32", "line_stride": "i32", "count": "i32", "capacity": "i32", "T": "i32"}
    numbers |= {
        f"{name}{m}": kind for m in range(MODULES) for name, kind in (("line", "i32"), ("salt", "i64"))
    }
    for dtype, weight, adds, modules, apart, drops in (
        ("bf16", "bf16", True, 2, True, False), ("bf16", "bf16", True, 2, False, False),
        ("bf16", "bf16", False, 3, False, False),
        ("bf16", "fp32", False, 3, False, True),
        ("fp16", "fp16", True, 2, True, False),
        ("bf16", None, False, 1, True, False), ("bf16", None, False, 1, False, True),
    ):  # fmt: skip
        x = f"*{dtype}:16"
        signature = {"x": x, "y": x, "a0": x, "a1": x, "a2": x, "h": "*fp32:16", **TABLE_TYPES, **numbers}
        signature |= {"K": "i32:16", "R": "i32:16", "eps": "fp32"}
        how: dict[str, Any] = {"SEGMENTS": 32, "DROPS": drops, "APART": apart, "PART": PART, "LANES": LANES}
        how |= {"NORMS": weight is not None, "ADDS": adds, "WIDE": weight == "fp32", "SILU": True}
        how |= {"MODULES": modules}
        given = {"w": weight and f"*{weight}:16", "residual": adds and x, "total": weight and x}
        given |= dict.fromkeys(("keys", "rates"), False) | (DROPOUT_TYPES if drops else {})
        signature |= {name: kind for name, kind in given.items() if kind and name != "salt"}
        how |= {name: None for name, kind in given.items() if not kind}
        cases.append(AotCase(fused_shrink_kernel, signature, how, TUNED, hot=dtype == "bf16"))
    return cases


AOT_CASES = _cases()
