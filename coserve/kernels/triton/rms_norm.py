"""RMS norm, add and norm, and their backward: a program takes some whole rows, piece by piece.

A row's sums run over pieces of BLOCK features, lane by lane, and over the lanes in one tree: nothing of it
depends on other rows. The row is read a second time to be normed, from the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense, require_rows, require_same
from coserve.kernels.triton.tuning import Tuned

MAX_BLOCK = 1024


def _example(device: torch.device) -> Callable[[], Any]:
    x = torch.randn(256, 4096, device=device, dtype=torch.bfloat16)
    w = torch.ones(4096, device=device, dtype=torch.bfloat16)
    return lambda: rms_norm(x, w, 1e-6)


SETTINGS = ({"TILE": tile, "num_warps": w, "num_stages": 2} for tile in (1024, 2048, 4096) for w in (2, 4, 8))
TUNED = Tuned("rms_norm", {"TILE": 1024, "num_warps": 4, "num_stages": 2}, tuple(SETTINGS), _example)


@triton.jit
def _rows(x_stride, inner, rows, H, ROWS: tl.constexpr):
    """Of the program's rows: which exist, where they begin in a strided tensor and in a dense one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (row < rows)[:, None], (row // inner * x_stride + row % inner * H)[:, None], (row * H)[:, None]


@triton.jit
def norm_kernel(
    x, x_stride, inner, residual, w, rows, H, eps, total, y, ADDS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y = norm(x), or with ADDS of x + residual, which goes to `total`; w in fp32 beside 16
    bits with WIDE. Row r of x lies at r // inner * x_stride + r % inner * H."""
    ROWS: tl.constexpr = TILE // BLOCK
    real, strided, dense = _rows(x_stride, inner, rows, H, ROWS)
    dtype = y.dtype.element_ty
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = real & (column < H)
        value = tl.load(x + strided + column, inside, 0.0).to(tl.float32)
        if ADDS:
            value += tl.load(residual + dense + column, inside, 0.0).to(tl.float32)
            tl.store(total + dense + column, value.to(dtype), inside)
            value = value.to(dtype).to(tl.float32)
        squares += value * value
    r = tl.rsqrt(tl.sum(squares, 1) / H + eps)[:, None]
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = real & (column < H)
        value = tl.load(x + strided + column, inside, 0.0).to(tl.float32)
        if ADDS:
            value = (value + tl.load(residual + dense + column, inside, 0.0).to(tl.float32)).to(dtype)
        normed = value.to(tl.float32) * r
        weight = tl.load(w + column, column < H, 0.0).to(tl.float32)
        if WIDE:
            normed = normed * weight
        else:
            normed = normed.to(dtype).to(tl.float32) * weight
        tl.store(y + dense + column, normed.to(dtype), inside)


@triton.jit
def norm_backward_kernel(
    dy, x, w, rows, H, eps, dx, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """ROWS rows of dx [rows, H], of dy and x dense."""
    ROWS: tl.constexpr = TILE // BLOCK
    real, _, dense = _rows(H, 1, rows, H, ROWS)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = real & (column < H)
        value = tl.load(x + dense + column, inside, 0.0).to(tl.float32)
        g = tl.load(dy + dense + column, inside, 0.0).to(tl.float32)
        g *= tl.load(w + column, column < H, 0.0).to(tl.float32)
        squares += value * value
        products += g * value
    r = tl.rsqrt(tl.sum(squares, 1) / H + eps)[:, None]
    mean = tl.sum(products, 1)[:, None] / H * r
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = real & (column < H)
        value = tl.load(x + dense + column, inside, 0.0).to(tl.float32)
        g = tl.load(dy + dense + column, inside, 0.0).to(tl.float32)
        g *= tl.load(w + column, column < H, 0.0).to(tl.float32)
        gradient = r * (g - value * r * mean)
        tl.store(dx + dense + column, gradient.to(dx.dtype.element_ty), inside)


def rms_norm(x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of every row of `x` [..., H] (first stride free)."""
    require_rows(x=x_TH)
    y_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    return _launch(x_TH, None, w_H, eps, None, y_TH)


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, w_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm(x + residual), x + residual)`."""
    require_same(x_TH, residual=residual_TH)
    require_dense(x=x_TH, residual=residual_TH)
    require(residual_TH.shape == x_TH.shape, f"residual {tuple(residual_TH.shape)}, x {tuple(x_TH.shape)}")
    y_TH, total_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    return _launch(x_TH, residual_TH, w_H, eps, total_TH, y_TH), total_TH


def rms_norm_backward(dy_TH: torch.Tensor, x_TH: torch.Tensor, w_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient w.r.t. `x` [..., H], in dy's dtype."""
    H = _check_weight(x_TH, w_H)
    require_same(dy_TH, x=x_TH)
    require_dense(dy=dy_TH, x=x_TH)
    require(dy_TH.shape == x_TH.shape, f"dy {tuple(dy_TH.shape)}, x {tuple(x_TH.shape)}")
    dx_TH = torch.empty_like(dy_TH)
    rows = x_TH.numel() // H
    if rows:
        grid, settings = _grid(rows, H, x_TH.device)
        norm_backward_kernel[grid](dy_TH, x_TH, w_H, rows, H, eps, dx_TH, **settings)
    return dx_TH


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    H = _check_weight(x, w)
    rows = x.numel() // H
    if rows:
        grid, settings = _grid(rows, H, x.device)
        adds, is_wide = residual is not None, w.dtype != x.dtype
        inner = rows // len(x)
        norm_kernel[grid](
            x, x.stride(0), inner, residual, w, rows, H, eps, total, y, adds, is_wide, **settings
        )
    return y


def _grid(rows: int, H: int, device: torch.device) -> tuple[tuple[int], dict[str, int]]:
    settings = dict(TUNED.on(device), BLOCK=min(next_power_of_2(H), MAX_BLOCK))
    return (cdiv(rows, settings["TILE"] // settings["BLOCK"]),), settings


def _check_weight(x: torch.Tensor, w: torch.Tensor) -> int:
    require(w.dtype in (x.dtype, torch.float32) and w.device == x.device, f"w is {w.dtype} on {w.device}")
    require_dense(w=w)
    require(w.shape == x.shape[-1:], f"w has shape {tuple(w.shape)}, expected ({x.shape[-1]},)")
    return w.numel()


def _cases() -> list[AotCase]:
    cases = []
    for dtype, weight in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        x, w = f"*{dtype}:16", f"*{weight}:16"
        sizes = {"rows": "i32", "H": "i32:16", "eps": "fp32"}
        strides = {"x_stride": "i32:16", "inner": "i32"}
        for block in (128, MAX_BLOCK):
            shape = {"BLOCK": block}
            forward = {"x": x, **strides, "w": w, **sizes, "y": x}
            how = {"ADDS": False, "WIDE": weight != dtype, "residual": None, "total": None}
            cases.append(AotCase(norm_kernel, forward, how | shape, TUNED))
            added = {"x": x, **strides, "residual": x, "w": w, **sizes, "total": x, "y": x}
            cases.append(AotCase(norm_kernel, added, {"ADDS": True, "WIDE": weight != dtype} | shape, TUNED))
            backward = {"dy": x, "x": x, "w": w, **sizes, "dx": x}
            cases.append(AotCase(norm_backward_kernel, backward, shape, TUNED))
    return cases


AOT_CASES = _cases()
