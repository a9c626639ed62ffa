"""RoPE, gated activations, the soft cap and the KV store in the interpreter."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.kv_store import kv_store
from coserve.kernels.rope import apply_rope_
from coserve.kernels.soft_cap import soft_cap_
from coserve.kernels.swiglu import ACTIVATIONS, swiglu, swiglu_backward
from tests.kernels.oracle import INTERPRETED_DTYPES, check


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("shape, half", [((1, 1, 2), 1), ((5, 9, 16), 8), ((3, 2, 20), 6)], ids=str)
def test_rope_and_its_inverse(shape: tuple[int, int, int], half: int, dtype: torch.dtype) -> None:
    x, angles = torch.randn(shape, dtype=dtype), torch.randn(11, half)
    positions = torch.randint(0, 11, shape[:1])
    for inverse in (False, True):
        check(
            lambda x, inverse=inverse: (apply_rope_(x, positions, angles.cos(), angles.sin(), inverse),),
            x.clone(),
            bound=1e-6,
        )


def test_rope_turns_a_slice_of_a_merged_projection() -> None:
    merged, angles = torch.randn(4, 6, 8), torch.randn(7, 4)
    positions, before = torch.tensor([3, 0, 6, 1]), merged.clone()
    tables = angles.cos(), angles.sin()
    apply_rope_(merged[:, 1:4], positions, *tables)
    assert torch.equal(merged[:, 1:4], apply_rope_(before[:, 1:4].contiguous(), positions, *tables))
    assert torch.equal(merged[:, 4:], before[:, 4:]) and torch.equal(merged[:, :1], before[:, :1])
    with pytest.raises(ValueError, match="contiguous"):
        apply_rope_(merged.transpose(1, 2), positions, *tables)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_activation(act: str, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 37), (2, 1030)):
        gate_up = 3 * torch.randn(shape[0], 2 * shape[1], dtype=dtype)
        dy = torch.randn(shape, dtype=dtype)
        check(lambda g: (swiglu(g, act),), gate_up)
        check(lambda dy, g: (swiglu_backward(dy, g, act),), dy, gate_up)
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(torch.randn(8, 4).t(), act)
    assert swiglu(torch.empty(0, 8), act).shape == (0, 4)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_soft_cap(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-90, 90, 1100), torch.tensor([0.0, 1e-4, -1e-4, 5.9, 6.1]))).to(dtype)
    check(lambda x: (soft_cap_(x.clone(), 30.0),), x)
    small = torch.linspace(-8, 8, 257)
    torch.testing.assert_close(soft_cap_(small.clone(), 30.0), 30 * torch.tanh(small / 30), rtol=1e-6, atol=0)


def test_kv_store_writes_the_slots_and_nothing_else() -> None:
    merged = torch.randn(5, 4, 8)
    k, v = merged[:, :2], merged[:, 2:]
    slab = torch.full((3, 2, 4, 2, 8), float("nan"))
    k_cache, v_cache = slab[:, 0], slab[:, 1]
    slots = torch.tensor([0, 7, -1, 11, 4])
    kv_store(k, v, k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_cache[slot // 4, slot % 4], k[token])
            assert torch.equal(v_cache[slot // 4, slot % 4], v[token])
    assert int(slab.isnan().sum()) == slab.numel() - 4 * 2 * 16
    with pytest.raises(ValueError, match="slots"):
        kv_store(k, v, k_cache, v_cache, slots[:4])
    with pytest.raises(ValueError, match="contiguous"):
        kv_store(k.transpose(1, 2), v.transpose(1, 2), k_cache, v_cache, slots)
