"""The decoder that all families share, forward and backward. Run it under torch.inference_mode or no_grad.

x -> x + attention(norm(x)) -> x + mlp(norm(x)),   layer by layer; final norm; head
"""

from __future__ import annotations

import math

import torch

from coserve.layers.activations import LayerActivations
from coserve.layers.attention import Attention, RopeTable
from coserve.layers.batch import BackwardWindow, ForwardBatch
from coserve.layers.embedding import Embedding
from coserve.layers.lm_head import LMHead
from coserve.layers.mlp import MLP
from coserve.layers.norm import RMSNorm
from coserve.models.config import ModelConfig


class DecoderLayer:
    """One pre-norm block."""

    def __init__(self, attn_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP) -> None:
        self.attn_norm = attn_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int) -> torch.Tensor:
        """[T, H] of [T, H]; training rows leave behind what their backward needs."""
        for window in batch.windows:
            window.saved.layer(layer).keep(window.stream, x_in_TH=x_TH[window.batch_rows])
        normed_TH, x_mid_TH = self._attend(x_TH, batch, layer)
        return self.mlp.forward(normed_TH, batch, layer).add_(x_mid_TH)

    def _attend(
        self, x_TH: torch.Tensor, batch: ForwardBatch, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention half: (normed input of the MLP, x_mid), [T, H] each."""
        attended_TH = self.attention.forward(self.attn_norm.forward(x_TH), batch, layer)
        normed_TH, x_mid_TH = self.mlp_norm.add_forward(attended_TH, x_TH)
        for window in batch.windows:
            window.saved.layer(layer).keep(window.stream, x_mid_TH=x_mid_TH[window.batch_rows])
        return normed_TH, x_mid_TH

    def _complete(self, window: BackwardWindow) -> tuple[LayerActivations, torch.Tensor]:
        """The window's own activations with what the policy dropped computed again by the forward's own
        parts, and the MLP's normed input [W, H]."""
        saved = window.saved.rows(window.stream)
        assert saved.x_in_TH is not None
        batch = window.forward_batch(saved)
        if saved.x_mid_TH is None:
            normed_WH, _ = self._attend(saved.x_in_TH, batch, window.layer)
        else:
            normed_WH = self.mlp_norm.forward(saved.x_mid_TH)
        if saved.gate_up_T2I is None:
            self.mlp.forward_gate_up(normed_WH, batch, window.layer)
        return saved, normed_WH

    def backward(self, dy_WH: torch.Tensor, window: BackwardWindow) -> torch.Tensor | None:
        """Gradient w.r.t. the window's input [W, H] of that w.r.t. its output, None in the lowest adapted
        layer; adds the adapters' gradients and those of the keys and values it saw."""
        saved, normed_WH = self._complete(window)
        x_in_WH, x_mid_WH = saved.x_in_TH, saved.x_mid_TH
        assert x_in_WH is not None and x_mid_WH is not None
        ends_here = window.lowest and not self.attention.is_adapted(window.lora)
        dnormed_WH = self.mlp.backward(dy_WH, normed_WH, saved, window, needs_input=not ends_here)
        if dnormed_WH is None:
            return None
        dx_mid_WH = self.mlp_norm.backward(dnormed_WH, x_mid_WH).add_(dy_WH)
        dnormed_WH = self.attention.backward(dx_mid_WH, self.attn_norm.forward(x_in_WH), saved, window)
        if dnormed_WH is None:
            return None
        return self.attn_norm.backward(dnormed_WH, x_in_WH).add_(dx_mid_WH)


class Decoder:
    """A frozen base model on one device, in one dtype (`loader.py` makes it)."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: LMHead,
        rope: RopeTable,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = rope

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def lora_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear that an adapter may sit on."""
        return {name: self.config.module_shape(name) for name in self.config.linear_modules}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their packed copies; a shared table counts once."""
        total = self.head.nbytes
        if self.embedding.weight.data_ptr() != self.head.weight.data_ptr():
            total += self.embedding.weight.nbytes
        for layer in self.layers:
            merged = layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down
            total += sum(linear.packed.nbytes for linear in merged)
        return total

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, H] of int64 token ids."""
        return self.embedding.forward(token_ids_T)

    def forward_layers(
        self, x_TH: torch.Tensor, batch: ForwardBatch, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Layers [first, last) over the batch's rows. After the last layer the training windows keep their
        output, which the loss starts from."""
        last = len(self.layers) if last is None else last
        for layer in range(first, last):
            x_TH = self.layers[layer].forward(x_TH, batch, layer)
        if last == len(self.layers):
            for window in batch.windows:
                if window.x_out_TH is not None:
                    window.x_out_TH[window.stream] = x_TH[window.batch_rows]
        return x_TH

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Embedding and all layers: [T, H] before the final norm."""
        return self.forward_layers(self.embed(batch.token_ids_T), batch)

    def final_norm(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What the head reads; rows stand alone, so only those that need logits have to be given."""
        return self.norm.forward(x_TH)

    def final_norm_backward(self, dh_TH: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """Gradient w.r.t. the last layer's output `x`."""
        return self.norm.backward(dh_TH, x_TH)

    def logits(self, h_SH: torch.Tensor) -> torch.Tensor:
        """fp32 [S, V] of normed hidden states [S, H]."""
        return self.head.logits(h_SH)


def make_rope_table(config: ModelConfig, device: torch.device | str = "cpu") -> RopeTable:
    """cos, sin fp32 [max positions, D/2]: angle = position * theta^(-2i/D), frequencies stretched as the
    file says (Llama 3.1: those with wavelengths beyond the original context by `factor`, smoothly)."""
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        wavelength = 2 * math.pi / frequency
        smooth = (scaling.original_max_position_embeddings / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequency = torch.where(
            smooth <= 0, frequency / scaling.factor, torch.where(smooth >= 1, frequency, blended)
        )
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angle_PD2 = positions[:, None] * frequency[None, :]
    return RopeTable(angle_PD2.cos().to(device), angle_PD2.sin().to(device))
