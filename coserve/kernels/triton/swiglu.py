"""Gated activation and its backward, a piece of a row a program.

The tanh form of GELU is gate * sigmoid(2 u) with u = sqrt(2 / pi) (gate + 0.044715 gate^3), as 1 + tanh(u) is
2 sigmoid(2 u): no digits cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.elementary import sigmoid
from coserve.kernels.triton.support import cdiv, require_dense, require_same
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Callable[[], Any]:
    gate_up = torch.randn(256, 2 * 14336, device=device, dtype=torch.bfloat16)
    return lambda: swiglu(gate_up, "silu")


SETTINGS = ({"BLOCK": b, "num_warps": w, "num_stages": 1} for b in (512, 1024, 2048) for w in (4, 8))
TUNED = Tuned("swiglu", {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}, tuple(SETTINGS), _example)


@triton.jit
def _activate(gate, SILU: tl.constexpr):
    """(activated gate, derivative)."""
    if SILU:
        s = sigmoid(gate)
        slope = s * (1.0 + gate * (1.0 - s))
    else:
        root = 0.7978845608028654
        u = root * (gate + 0.044715 * gate * gate * gate)
        s = sigmoid(2.0 * u)
        slope = s + 2.0 * gate * s * sigmoid(-2.0 * u) * root * (1.0 + 3.0 * 0.044715 * gate * gate)
    return gate * s, slope


@triton.jit
def swiglu_kernel(gate_up, width, y, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A BLOCK of a row of y [T, width] = act(gate) * up of gate_up [T, 2 width]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, inside, 0.0).to(tl.float32)
    activated, _ = _activate(gate, SILU)
    tl.store(y + row * width + column, (activated * up).to(y.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(dy, gate_up, width, dgate_up, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A BLOCK of a row of dgate_up [T, 2 width], of dy [T, width] and gate_up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = dgate_up.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, inside, 0.0).to(tl.float32)
    d = tl.load(dy + row * width + column, inside, 0.0).to(tl.float32)
    activated, slope = _activate(gate, SILU)
    tl.store(dgate_up + row * 2 * width + column, (d * up * slope).to(dtype), inside)
    tl.store(dgate_up + (row * 2 + 1) * width + column, (d * activated).to(dtype), inside)


def swiglu(gate_up_T2I: torch.Tensor, act: str) -> torch.Tensor:
    """`act(gate) * up` [T, I] of contiguous `gate_up` [T, 2I]."""
    require_dense(gate_up=gate_up_T2I)
    T, double = gate_up_T2I.shape
    require(double % 2 == 0, f"gate_up has {double} columns, expected an even number")
    y_TI = gate_up_T2I.new_empty(T, double // 2)
    if y_TI.numel():
        settings = TUNED.on(y_TI.device)
        grid = (T, cdiv(double // 2, settings["BLOCK"]))
        swiglu_kernel[grid](gate_up_T2I, double // 2, y_TI, act == "silu", **settings)
    return y_TI


def swiglu_backward(dy_TI: torch.Tensor, gate_up_T2I: torch.Tensor, act: str) -> torch.Tensor:
    """Gradient w.r.t. `gate_up` [T, 2I]."""
    require_same(gate_up_T2I, dy=dy_TI)
    require_dense(gate_up=gate_up_T2I, dy=dy_TI)
    T, width = dy_TI.shape
    shape = tuple(gate_up_T2I.shape)
    require(shape == (T, 2 * width), f"gate_up {shape}, dy {tuple(dy_TI.shape)}")
    dgate_up_T2I = torch.empty_like(gate_up_T2I)
    if dy_TI.numel():
        settings = TUNED.on(dy_TI.device)
        grid = (T, cdiv(width, settings["BLOCK"]))
        swiglu_backward_kernel[grid](dy_TI, gate_up_T2I, width, dgate_up_T2I, act == "silu", **settings)
    return dgate_up_T2I


def _cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        for is_silu in (True, False):
            x = f"*{dtype}:16"
            forward = {"gate_up": x, "width": "i32:16", "y": x}
            backward = {"dy": x, "gate_up": x, "width": "i32:16", "dgate_up": x}
            cases.append(AotCase(swiglu_kernel, forward, {"SILU": is_silu}, TUNED))
            cases.append(AotCase(swiglu_backward_kernel, backward, {"SILU": is_silu}, TUNED))
    return cases


AOT_CASES = _cases()
