"""The optimizers in the interpreter, against torch's and their references."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import BLOCK, QuantizedMoments, adamw_8bit_
from coserve.kernels.chunk_squares import CHUNK, chunk_squares
from coserve.kernels.dispatch import use_backend
from coserve.kernels.sgd import sgd_
from tests.kernels.oracle import error

ADAM = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}


def gradients(size: int, steps: int) -> list[torch.Tensor]:
    """Gradients with a common direction, noise, and sizes over four powers of ten."""
    towards, spread = torch.randn(size), torch.logspace(-4, 0, size)[torch.randperm(size)]
    return [(towards + torch.randn(size)) * spread for _ in range(steps)]


@pytest.mark.parametrize("size", (1, 37, 2100))
def test_adamw_matches_torch(size: int) -> None:
    start = torch.randn(size)
    oracle = torch.nn.Parameter(start.double())
    theirs = torch.optim.AdamW([oracle], lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    for step, grad in enumerate(gradients(size, 4), 1):
        oracle.grad = grad.double() * 0.5
        theirs.step()
        adamw_(param, grad, exp_avg, exp_avg_sq, step=step, **ADAM)
    assert error(param, oracle.detach()) < 5e-7
    assert error(exp_avg_sq, theirs.state[oracle]["exp_avg_sq"]) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_matches_torch(momentum: float, weight_decay: float) -> None:
    start = torch.randn(1300)
    peer = torch.nn.Parameter(start.double())
    theirs = torch.optim.SGD([peer], lr=0.05, momentum=momentum, weight_decay=weight_decay)
    param, buffer = start.clone(), torch.zeros(1300) if momentum else None
    for grad in gradients(1300, 3):
        peer.grad = grad.double() * 0.5
        theirs.step()
        sgd_(param, grad, buffer, lr=0.05, momentum=momentum, weight_decay=weight_decay, grad_scale=0.5)
    assert error(param, peer.detach()) < 1e-6


@pytest.mark.parametrize("spans", [[(0, 1, 1.0)], [(3, 260, 1.0), (260, 800, 16.0)]])
def test_8bit_matches_its_reference(spans: list[tuple[int, int, float]]) -> None:
    size = spans[-1][1] + 5
    start, given, ends = torch.randn(size), gradients(size, 6), []
    for backend in ("triton", "reference"):
        param, moments = start.clone(), QuantizedMoments.zeros(spans)
        with use_backend(backend):
            for step, grad in enumerate(given, 1):
                adamw_8bit_(param, grad, moments, step=step, **ADAM)
        ends.append((param, moments))
    (ours, got), (theirs, want) = ends
    assert error(ours, theirs) < 1e-6
    assert torch.allclose(got.m_scale_B, want.m_scale_B, rtol=1e-5, atol=0)
    # A value on the edge of two codes may fall either way.
    for a, b in ((got.m_BE, want.m_BE), (got.v_BE, want.v_BE)):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
    outside = torch.ones(size, dtype=torch.bool)
    for first, last, _ in spans:
        outside[first:last] = False
    assert torch.equal(ours[outside], start[outside]) and bool(outside.any())


def test_8bit_of_a_zero_gradient_only_decays() -> None:
    param, moments = torch.ones(300), QuantizedMoments.zeros([(0, 300, 1.0)])
    codes = moments.m_BE.clone(), moments.v_BE.clone()
    adamw_8bit_(param, torch.zeros(300), moments, step=1, **ADAM)
    assert torch.equal(param, torch.full((300,), 1 - ADAM["lr"] * ADAM["weight_decay"]))
    assert torch.equal(moments.m_BE, codes[0]) and torch.equal(moments.v_BE, codes[1])
    assert not moments.m_scale_B.any() and not moments.v_scale_B.any()


def test_nothing_to_do_and_what_does_not_fit() -> None:
    none, x = torch.empty(0), torch.zeros(2 * BLOCK)
    adamw_(none, none, none, none, step=1, **ADAM)
    sgd_(none, none, None, lr=1.0, momentum=0.0, weight_decay=0.0)
    adamw_8bit_(none, none, QuantizedMoments.zeros([]), step=1, **ADAM)
    with pytest.raises(ValueError, match="exp_avg must"):
        adamw_(x, x, x.half(), x, step=1, **ADAM)
    with pytest.raises(ValueError, match="momentum_buffer must"):
        sgd_(x, x, x[::2], lr=1.0, momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match="grad must"):
        adamw_8bit_(x, x[::2], QuantizedMoments.zeros([(0, 4, 1.0)]), step=1, **ADAM)


@pytest.mark.parametrize("size", [1, CHUNK, 2 * CHUNK + 77])
def test_chunk_squares(size: int) -> None:
    x = torch.randn(size)
    got = chunk_squares(x)
    with use_backend("reference"):
        want = chunk_squares(x)
    assert got.dtype == torch.float64 and got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="flat fp32"):
        chunk_squares(torch.randn(4, 2).t())
