"""Gated MLP: down(act(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

import torch

from coserve.kernels.swiglu import Activation, swiglu, swiglu_backward
from coserve.layers.batch import BackwardWindow, ForwardBatch
from coserve.layers.linear import AdaptedLinear


class MLP:
    """`gate_up` yields [T, 2I], gate first."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, act: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.act = act

    def forward(self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int) -> torch.Tensor:
        """[T, H] of normed input [T, H]; saves gate and up of the training rows."""
        gate_up_T2I = self.gate_up.forward(x_TH, batch.lora, layer)
        for window in batch.windows:
            saved = window.saved.layer(layer).gate_up_T2I
            if saved is not None:
                saved[window.stream] = gate_up_T2I[window.batch_rows]
        return self.down.forward(swiglu(gate_up_T2I, self.act), batch.lora, layer)

    def backward(self, dy_WH: torch.Tensor, x_WH: torch.Tensor, window: BackwardWindow) -> torch.Tensor:
        """Gradient w.r.t. the normed input `x` [W, H]."""
        assert window.saved.gate_up_T2I is not None
        gate_up_W2I = window.saved.gate_up_T2I[window.stream]
        lora, start = window.lora, window.start
        dact_WI = self.down.backward(dy_WH, lambda: swiglu(gate_up_W2I, self.act), lora, start)
        dgate_up_W2I = swiglu_backward(dact_WI, gate_up_W2I, self.act)
        return self.gate_up.backward(dgate_up_W2I, lambda: x_WH, lora, start)
