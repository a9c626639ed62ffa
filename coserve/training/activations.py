"""Where a microbatch in flight keeps its activations: one extent of bytes, cut into named buffers."""

from __future__ import annotations

import math

import torch

from coserve.layers.activations import BlockShape, LayerActivations

ALIGNMENT = 64  # bytes


class MicrobatchActivations:
    """Buffers of all layers for T tokens, the last layer's output, and the backward's own workspaces.

    Layers below `lowest_layer` (the lowest adapted one) keep only keys and values. `dh_TH` is the gradient
    that the backward carries downwards, `dk_TND`, `dv_TND` (fp32) those of the layer at work.
    """

    def __init__(
        self,
        extent: torch.Tensor,
        config: BlockShape,
        num_layers: int,
        tokens: int,
        dtype: torch.dtype,
        lowest_layer: int,
    ) -> None:
        """Cut `extent` (flat uint8, at least `nbytes` long, aligned to 64 bytes) into buffers."""
        buffers: dict[str, torch.Tensor] = {}
        end = 0
        for name, shape, kind in _shapes(config, num_layers, tokens, dtype, lowest_layer):
            size = math.prod(shape) * kind.itemsize
            buffers[name] = extent[end : end + size].view(kind).view(shape)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.x_out_TH = buffers["x_out_TH"]
        self.dh_TH = buffers["dh_TH"]
        self.dk_TND = buffers["dk_TND"]
        self.dv_TND = buffers["dv_TND"]
        self._layers = []
        for layer in range(num_layers):
            prefix = f"{layer}."
            own = {name.removeprefix(prefix): t for name, t in buffers.items() if name.startswith(prefix)}
            self._layers.append(LayerActivations.from_buffers(own))

    @staticmethod
    def nbytes(
        config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
    ) -> int:
        """Bytes of the extent that a microbatch of `tokens` tokens needs."""
        shapes = _shapes(config, num_layers, tokens, dtype, lowest_layer)
        sizes = (math.prod(shape) * kind.itemsize for _, shape, kind in shapes)
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    def layer(self, layer: int) -> LayerActivations:
        """Buffers of one layer."""
        return self._layers[layer]


def _shapes(
    config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    key = (tokens, config.num_kv_heads, config.head_dim)
    shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
        ("x_out_TH", (tokens, config.hidden_size), dtype),
        ("dh_TH", (tokens, config.hidden_size), dtype),
        ("dk_TND", key, torch.float32),
        ("dv_TND", key, torch.float32),
    ]
    for layer in range(num_layers):
        for name, shape, kind in LayerActivations.shapes(config, tokens, dtype, layer >= lowest_layer):
            shapes.append((f"{layer}.{name}", shape, kind))
    return shapes
