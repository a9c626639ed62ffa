from dataclasses import dataclass

import pytest
import torch

from coserve.worker.kv_tensors import KVTensors, slab_bytes


@dataclass
class Shapes:
    num_layers: int = 3
    num_kv_heads: int = 2
    head_dim: int = 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_block_belongs_to_its_owner_in_every_layer(dtype, block_size):
    kv = KVTensors(Shapes(), 5, block_size, dtype)
    kv.arena.zero_()
    for layer in range(3):
        for cache in kv.layer(layer):
            assert cache.shape == (5, block_size, 2, 6) and cache.dtype == dtype
            assert cache[0].is_contiguous()
            cache[2] = 1.0
    used = kv.arena.view(5, kv.slab_bytes).ne(0).any(dim=1)
    assert used.tolist() == [False, False, True, False, False]


def test_layers_and_sides_do_not_overlap():
    kv = KVTensors(Shapes(), 4, 4, torch.float32)
    value = 0.0
    for layer in range(3):
        for cache in kv.layer(layer):
            value += 1.0
            cache.fill_(value)
    seen = [float(x) for layer in range(3) for cache in kv.layer(layer) for x in cache.unique()]
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_extents_are_the_bytes_of_their_slabs():
    kv = KVTensors(Shapes(), 4, 4, torch.float32)
    kv.arena.zero_()
    extent = kv.extent(1, 2)
    assert extent.shape == (2 * kv.slab_bytes,) and extent.data_ptr() % 64 == 0
    extent.fill_(255)
    assert kv.arena.view(4, kv.slab_bytes).ne(0).all(dim=1).tolist() == [False, True, True, False]
    assert kv.slabs_for(kv.slab_bytes) == 1 and kv.slabs_for(kv.slab_bytes + 1) == 2
    with pytest.raises(ValueError, match="slabs"):
        kv.extent(3, 2)


def test_sizes():
    assert slab_bytes(Shapes(), 4, torch.float32) == 1152
    assert slab_bytes(Shapes(), 1, torch.bfloat16) == 192
    kv = KVTensors(Shapes(), 7, 4, torch.float32)
    assert kv.nbytes == 7 * kv.slab_bytes and kv.device.type == "cpu"
