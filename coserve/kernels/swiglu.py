"""Gated activation of the MLP and its backward (Shazeer 2020).

    y = act(gate) * up
    dgate = dy * up * act'(gate),   dup = dy * act(gate)

act is SiLU or the tanh form of GELU; computed in fp32, rounded once.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_like,
    triton_or_reference,
    wide,
)

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def swiglu(gate_up_T2I: torch.Tensor, act: Activation = "silu") -> torch.Tensor:
    """`act(gate) * up` [T, I] of `gate_up` [T, 2I] (gate first); fp32 or bf16."""
    _check_activation(act)
    native = native_for(gate_up_T2I)
    if native is None:
        return triton_or_reference(gate_up_T2I, _swiglu_reference)(gate_up_T2I, act)
    T, double = gate_up_T2I.shape
    if double % 2 or not gate_up_T2I.is_contiguous():
        require_like(gate_up_T2I, contiguous=True, gate_up=gate_up_T2I)
        raise ValueError(f"gate_up has {double} columns, expected an even number")
    y_TI = torch.empty((T, double // 2), dtype=gate_up_T2I.dtype)
    native.swiglu(
        DTYPE_CODES[y_TI.dtype],
        gate_up_T2I.data_ptr(),
        T,
        double // 2,
        ACTIVATIONS.index(act),
        y_TI.data_ptr(),
    )
    return y_TI


def swiglu_backward(dy_TI: torch.Tensor, gate_up_T2I: torch.Tensor, act: Activation = "silu") -> torch.Tensor:
    """Gradient w.r.t. `gate_up` [T, 2I], in its dtype."""
    _check_activation(act)
    native = native_for(gate_up_T2I)
    if native is None:
        return triton_or_reference(gate_up_T2I, _swiglu_backward_reference)(dy_TI, gate_up_T2I, act)
    T, width = dy_TI.shape
    require_like(gate_up_T2I, contiguous=True, gate_up=gate_up_T2I, dy=dy_TI)
    require(
        gate_up_T2I.shape == (T, 2 * width), f"gate_up {tuple(gate_up_T2I.shape)}, dy {tuple(dy_TI.shape)}"
    )
    dgate_up_T2I = torch.empty_like(gate_up_T2I)
    native.swiglu_backward(
        DTYPE_CODES[dy_TI.dtype],
        dy_TI.data_ptr(),
        gate_up_T2I.data_ptr(),
        T,
        width,
        ACTIVATIONS.index(act),
        dgate_up_T2I.data_ptr(),
    )
    return dgate_up_T2I


def _check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}: use one of {', '.join(ACTIVATIONS)}")


def _swiglu_reference(gate_up: torch.Tensor, act: str) -> torch.Tensor:
    gate, up = wide(gate_up).chunk(2, -1)
    activated = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
    return (activated * up).to(gate_up.dtype)


def _swiglu_backward_reference(dy: torch.Tensor, gate_up: torch.Tensor, act: str) -> torch.Tensor:
    gate, up = wide(gate_up).chunk(2, -1)
    dyf = wide(dy)
    if act == "silu":
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    else:
        root = (2 / torch.pi) ** 0.5
        tanh = torch.tanh(root * (gate + 0.044715 * gate**3))
        activated = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * root * (1 + 3 * 0.044715 * gate**2)
    return torch.cat((dyf * up * slope, dyf * activated), -1).to(gate_up.dtype)
