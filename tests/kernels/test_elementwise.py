from __future__ import annotations

import pytest
import torch

from coserve.kernels.kv_store import kv_store
from coserve.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from coserve.kernels.rope import apply_rope_
from coserve.kernels.soft_cap import soft_cap_
from coserve.kernels.swiglu import Activation, swiglu, swiglu_backward
from tests.kernels.oracle import DTYPES, check, error

SHAPES = [(1, 1), (3, 16), (5, 37), (130, 96), (2, 6, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    w = (torch.rand(shape[-1]) + 0.5).to(dtype)
    check(lambda x, w: (rms_norm(x, w, 1e-5),), x, w)
    check(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), x, residual, w)
    if shape[-1] > 1:  # for one feature the gradient is 0 up to eps
        check(lambda dy, x, w: (rms_norm_backward(dy, x, w, 1e-5),), dy, x, w)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_with_fp32_weights_rounds_once(isa: str, shape: tuple[int, ...]) -> None:
    x, residual, dy = (torch.randn(shape).bfloat16() for _ in range(3))
    w = 1 + torch.rand(shape[-1]) / 300  # 1 + w vanishes in bf16
    check(lambda x, w: (rms_norm(x, w, 1e-5),), x, w)
    check(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), x, residual, w)
    check(lambda dy, x, w: (rms_norm_backward(dy, x, w, 1e-5),), dy, x, w)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert (rms_norm(x, w, 1e-5) != (normed * w).bfloat16()).float().mean() < 0.02


@pytest.mark.parametrize("shape", [(1,), (3, 37), (2, 5000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.logspace(-6, 2, shape[-1])).to(dtype)
    check(lambda x: (soft_cap_(x.clone(), 30.0),), x)
    small = torch.tensor([1e-6, -1e-3, 0.0, 18.7, -18.8, 1e4, float("inf"), -float("inf")])
    exact = 30 * torch.tanh(small.double() / 30)
    got = soft_cap_(small.clone(), 30.0).double()
    assert ((got - exact).abs() <= 4e-7 * exact.abs()).all()
    assert soft_cap_(torch.tensor([float("nan")]), 30.0).isnan().all()


def test_rms_norm_backward_matches_autograd(isa: str) -> None:
    x, dy, w = torch.randn(4, 50), torch.randn(4, 50), torch.randn(50)
    with torch.enable_grad():
        leaf = x.double().requires_grad_()
        y = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5) * w.double()
        (want,) = torch.autograd.grad(y, leaf, dy.double())
    assert error(rms_norm_backward(dy, x, w, 1e-5), want) < 2e-6


def test_rms_norm_takes_heads_of_a_merged_projection(isa: str) -> None:
    merged, w = torch.randn(7, 5, 20), torch.randn(20)
    heads = merged[:, 1:4]
    assert torch.equal(rms_norm(heads, w, 1e-5), rms_norm(heads.contiguous(), w, 1e-5))
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(merged.transpose(1, 2).contiguous().transpose(1, 2), w, 1e-5)
    with pytest.raises(ValueError, match="w"):
        rms_norm(heads, w.bfloat16(), 1e-5)


@pytest.mark.parametrize(("N", "D", "half"), [(1, 2, 1), (4, 16, 8), (3, 80, 40), (2, 64, 12)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(isa: str, N: int, D: int, half: int, dtype: torch.dtype) -> None:
    angle = torch.arange(50)[:, None] / 10 ** (torch.arange(half) / half)
    cos, sin = angle.cos().contiguous(), angle.sin().contiguous()
    positions = torch.randint(0, 50, (9,))
    x = torch.randn(9, N, D).to(dtype)
    for inverse in (False, True):
        check(lambda x, inv=inverse: (apply_rope_(x.clone(), positions, cos, sin, inv),), x)
    merged = torch.randn(9, N + 2, D).to(dtype)
    want = apply_rope_(merged[:, 1 : N + 1].clone(), positions, cos, sin)
    outside = merged[:, 0].clone()
    assert torch.equal(apply_rope_(merged[:, 1 : N + 1], positions, cos, sin), want)
    assert torch.equal(merged[:, 0], outside)
    back = apply_rope_(want.clone(), positions, cos, sin, inverse=True)
    assert error(apply_rope_(back, positions, cos, sin), want.double()) < (
        1e-6 if dtype == torch.float32 else 1e-2
    )


def test_rope_refuses_wrong_tables() -> None:
    with pytest.raises(ValueError, match="frequencies"):
        apply_rope_(
            torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(1, 3)
        )
    with pytest.raises(ValueError, match="positions"):
        apply_rope_(
            torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2), torch.zeros(1, 2)
        )


@pytest.mark.parametrize("act", ("silu", "gelu_tanh"))
@pytest.mark.parametrize(("T", "width"), [(1, 1), (3, 37), (70, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(isa: str, act: Activation, T: int, width: int, dtype: torch.dtype) -> None:
    gate_up, dy = (4 * torch.randn(T, 2 * width)).to(dtype), torch.randn(T, width).to(dtype)
    check(lambda x: (swiglu(x, act),), gate_up)
    check(lambda dy, x: (swiglu_backward(dy, x, act),), dy, gate_up)


@pytest.mark.parametrize("act", ("silu", "gelu_tanh"))
def test_swiglu_backward_matches_autograd(isa: str, act: Activation) -> None:
    gate_up, dy = 3 * torch.randn(5, 40), torch.randn(5, 20)
    with torch.enable_grad():
        leaf = gate_up.double().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        activate = (
            torch.nn.functional.silu(gate)
            if act == "silu"
            else torch.nn.functional.gelu(gate, approximate="tanh")
        )
        (want,) = torch.autograd.grad(activate * up, leaf, dy.double())
    assert error(swiglu_backward(dy, gate_up, act), want) < 2e-6


def test_swiglu_of_large_values_is_finite(isa: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(swiglu(gate_up), torch.tensor([[0.0, 1e4, 0.0, 100.0]]), rtol=0, atol=1e-30)
    assert swiglu_backward(torch.ones(1, 4), gate_up).isfinite().all()
    with pytest.raises(ValueError, match="activation"):
        swiglu(gate_up, "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_store(isa: str, dtype: torch.dtype) -> None:
    slab = torch.zeros(5, 2, 4, 2, 6, dtype=dtype)
    merged = torch.randn(7, 4, 6).to(dtype)
    k, v = merged[:, :2], merged[:, 2:]
    slots = torch.tensor([3, 19, -1, 0, 7, 8, 12])
    kv_store(k, v, slab[:, 0], slab[:, 1], slots)
    want = torch.zeros_like(slab)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[slot // 4, 0, slot % 4], want[slot // 4, 1, slot % 4] = k[t], v[t]
    assert torch.equal(slab, want)
    with pytest.raises(ValueError, match="slots"):
        kv_store(k, v, slab[:, 0], slab[:, 1], slots.int())
