"""The one allocation that K, V and training activations share.

The arena is cut into slabs. A slab is one KV block over all layers, [L, 2, block_size, Nkv, D], so a block
belongs to its owner in every layer at once; a run of neighbouring slabs, an *extent*, is plain memory for the
activations of a training microbatch. Who owns which slab is decided in core/block_pool.py.
"""

from __future__ import annotations

from math import prod
from typing import Protocol

import torch

ALIGNMENT = 64  # bytes; a cache line, and what vector loads like best


class KVShapes(Protocol):
    """What is needed of a model's configuration."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def slab_bytes(config: KVShapes, block_size: int, dtype: torch.dtype) -> int:
    """Size of one slab, a multiple of the alignment."""
    elements = config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim
    return _aligned(elements * dtype.itemsize)


class KVTensors:
    """`num_blocks` slabs in one uninitialised allocation (on the CPU untouched pages take no memory)."""

    def __init__(
        self,
        config: KVShapes,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.slab_bytes = slab_bytes(config, block_size, dtype)
        self.arena = torch.empty(num_blocks * self.slab_bytes, dtype=torch.uint8, device=device)
        shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        slabs = self.arena.view(num_blocks, self.slab_bytes)[:, : prod(shape) * dtype.itemsize].view(dtype)
        by_layer = slabs.view(num_blocks, *shape)
        self._layers = [(by_layer[:, layer, 0], by_layer[:, layer, 1]) for layer in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        return self.arena.nbytes

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, V) caches of a layer, [B, block_size, Nkv, D] each, strided over the blocks."""
        return self._layers[layer]

    def slabs_for(self, nbytes: int) -> int:
        """Number of slabs that hold `nbytes`."""
        return -(-nbytes // self.slab_bytes)

    def extent(self, slab_start: int, slabs: int) -> torch.Tensor:
        """uint8 [slabs * slab_bytes]: the memory of neighbouring slabs from `slab_start` on."""
        if not 0 <= slab_start <= slab_start + slabs <= self.num_blocks:
            raise ValueError(f"{slabs} slabs from {slab_start} on are not within the {self.num_blocks}")
        return self.arena[slab_start * self.slab_bytes : (slab_start + slabs) * self.slab_bytes]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
