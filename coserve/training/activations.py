"""Where a microbatch in flight keeps its activations: one extent of bytes, cut into named buffers.

What policy C needs lies first, then what B adds layer by layer from the lowest, then what A adds. A *level*
says how much of that there is: 0 is C in every layer, each of the first n levels gives one more layer B (n
layers have a backward), each of the next n one more layer A. So going down a level gives up the extent's tail
and nothing else; and as the upper layers lie last, what the backward is done with goes first. At the very
beginning, the *head*, are keys and values of layers without a backward: only the forward needs them.
"""

from __future__ import annotations

import math

import torch

from coserve.layers.activations import BlockShape, Buffer, LayerActivations

ALIGNMENT = 64  # bytes


class KeysOnly:
    """The saver of a pass that only scores: its windows need one another's keys and values, nothing more."""

    def __init__(self, activations: MicrobatchActivations) -> None:
        self._activations = activations

    def layer(self, layer: int) -> LayerActivations:
        """Keys and values of one layer, in the microbatch's own buffers."""
        whole = self._activations.layer(layer)
        return LayerActivations(k_TND=whole.k_TND, v_TND=whole.v_TND)


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
        level: int | None = None,
    ) -> None:
        """Cut `extent` (flat uint8, at least as long as `level_bytes` says of `level`, aligned to 64 bytes)
        into buffers; no level stands for the highest."""
        self._lowest_layer = lowest_layer
        parts = _parts(config, num_layers, tokens, dtype, lowest_layer)
        self.level = len(parts) - 1 if level is None else level
        buffers: dict[str, torch.Tensor] = {}
        end = 0
        self._parts = [[name for name, _, _ in part] for part in parts[: self.level + 1]]
        for part in parts[: self.level + 1]:
            for name, shape, kind in part:
                size = math.prod(shape) * kind.itemsize
                buffers[name] = extent[end : end + size].view(kind).view(shape)
                end += _aligned(size)
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
    def level_bytes(
        config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
    ) -> list[int]:
        """Bytes of the extent at every level, ascending, for a microbatch of `tokens` tokens."""
        sizes, total = [], 0
        for part in _parts(config, num_layers, tokens, dtype, lowest_layer):
            total += sum(_aligned(math.prod(shape) * kind.itemsize) for _, shape, kind in part)
            sizes.append(total)
        return sizes

    @staticmethod
    def head_bytes(
        config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
    ) -> int:
        """Bytes at the extent's beginning that are free again after the forward."""
        keys = LayerActivations.buffers(config, tokens, dtype).keys
        return lowest_layer * sum(_aligned(math.prod(shape) * kind.itemsize) for _, shape, kind in keys)

    @classmethod
    def nbytes(
        cls, config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
    ) -> int:
        """Bytes of the extent at the highest level."""
        return cls.level_bytes(config, num_layers, tokens, dtype, lowest_layer)[-1]

    def layer(self, layer: int) -> LayerActivations:
        """Buffers of one layer."""
        return self._layers[layer]

    def release_head(self) -> None:
        """The forward is over: forget keys and values that no backward reads."""
        for saved in self._layers[: self._lowest_layer]:
            saved.k_TND, saved.v_TND = saved.k_TND[:0], saved.v_TND[:0]

    def downgrade(self, level: int) -> None:
        """Forget the buffers above `level`: their part of the extent is somebody else's now."""
        while self.level > level:
            for name in self._parts.pop():
                layer, _, field = name.partition(".")
                setattr(self._layers[int(layer)], field, None)
            self.level -= 1


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _parts(
    config: BlockShape, num_layers: int, tokens: int, dtype: torch.dtype, lowest_layer: int
) -> list[list[Buffer]]:
    """The buffers that each level adds to the one below it, in the extent's order."""
    key = (tokens, config.num_kv_heads, config.head_dim)
    layer_buffers = LayerActivations.buffers(config, tokens, dtype)
    first = [buffer for layer in range(lowest_layer) for buffer in _named(layer, layer_buffers.keys)]
    first += [
        ("x_out_TH", (tokens, config.hidden_size), dtype),
        ("dh_TH", (tokens, config.hidden_size), dtype),
        ("dk_TND", key, torch.float32),
        ("dv_TND", key, torch.float32),
    ]
    trained = range(lowest_layer, num_layers)
    for layer in trained:
        first += _named(layer, layer_buffers.keys) + _named(layer, layer_buffers.input)
    attention = [_named(layer, layer_buffers.attention) for layer in trained]
    return [first, *attention, *(_named(layer, layer_buffers.mlp) for layer in trained)]


def _named(layer: int, buffers: list[Buffer]) -> list[Buffer]:
    return [(f"{layer}.{name}", shape, dtype) for name, shape, dtype in buffers]
