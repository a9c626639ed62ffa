"""Gated activation of the MLP and its backward (Shazeer 2020).

    y = act(gate) * up
    dgate = dy * up * act'(gate),   dup = dy * act(gate)

act is SiLU or the tanh form of GELU; computed in fp32, rounded once.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from coserve.kernels.dispatch import wide

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def swiglu(gate_up_T2I: torch.Tensor, act: Activation = "silu") -> torch.Tensor:
    """`act(gate) * up` [T, I] of `gate_up` [T, 2I] (gate first); fp32 or bf16."""
    _check_activation(act)
    return _swiglu_reference(gate_up_T2I, act)


def swiglu_backward(dy_TI: torch.Tensor, gate_up_T2I: torch.Tensor, act: Activation = "silu") -> torch.Tensor:
    """Gradient w.r.t. `gate_up` [T, 2I], in its dtype."""
    _check_activation(act)
    return _swiglu_backward_reference(dy_TI, gate_up_T2I, act)


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
