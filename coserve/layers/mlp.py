"""Gated MLP: down(act(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

import torch

from coserve.kernels.lora_fused import swiglu_shrink
from coserve.kernels.swiglu import Activation, swiglu, swiglu_backward
from coserve.layers.activations import LayerActivations
from coserve.layers.batch import BackwardWindow, ForwardBatch
from coserve.layers.linear import AdaptedLinear
from coserve.layers.pieces import Pieces


class MLP:
    """`gate_up` yields [T, 2I], gate first."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, act: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.act = act

    def forward(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int, h_MPTR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, H] of normed input [T, H], with gate's and up's h if it came with that."""
        return self.forward_down(self.forward_gate_up(x_TH, batch, layer, h_MPTR), batch, layer)

    def forward_down(self, gate_up_T2I: torch.Tensor, batch: ForwardBatch, layer: int) -> torch.Tensor:
        """[T, H] of gate and up."""
        y_TI, h_MPTR = swiglu_shrink(gate_up_T2I, self.act, self.down.adapters(batch.lora, layer))
        return self.down.forward(y_TI, batch.lora, layer, h_MPTR=h_MPTR)

    def forward_gate_up(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int, h_MPTR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The forward as far as its backward needs it: gate and up [T, 2I], kept of the training rows."""
        alone = batch.inference is None and len(batch.windows) == 1
        window = batch.windows[0] if alone else None
        place = None if window is None else window.saved.layer(layer).place("gate_up_T2I", window.stream)
        gate_up_T2I = self.gate_up.forward(x_TH, batch.lora, layer, place, h_MPTR)
        if place is None:
            for window in batch.windows:
                window.saved.layer(layer).keep(window.stream, gate_up_T2I=gate_up_T2I[window.batch_rows])
        return gate_up_T2I

    def backward(
        self,
        dy_WH: torch.Tensor,
        x_WH: torch.Tensor,
        saved: LayerActivations,
        window: BackwardWindow,
        needs_input: bool = True,
    ) -> Pieces[torch.Tensor | None]:
        """Gradient w.r.t. the normed input `x` [W, H], None unless `needs_input`; `saved` is complete, and
        the window's own. In pieces."""
        gate_up_W2I = saved.gate_up_T2I
        assert gate_up_W2I is not None
        lora, start = window.lora, window.start
        dact_WI = self.down.backward(dy_WH, lambda: swiglu(gate_up_W2I, self.act), lora, start)
        yield
        dgate_up_W2I = swiglu_backward(dact_WI, gate_up_W2I, self.act)
        if not needs_input:
            self.gate_up.backward_adapter(dgate_up_W2I, lambda: x_WH, lora, start)
            return None
        return self.gate_up.backward(dgate_up_W2I, lambda: x_WH, lora, start)
