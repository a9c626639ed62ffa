"""What the optimizers' kernels must do on every device."""

from __future__ import annotations

import torch

from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import QuantizedMoments, adamw_8bit_
from coserve.kernels.dispatch import use_backend
from coserve.kernels.sgd import sgd_
from tests.kernels.oracle import error

ADAM = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SPANS = ([(0, 1, 1.0)], [(3, 260, 1.0), (260, 800, 16.0)])


def gradients(size: int, steps: int, decades: float = 4) -> list[torch.Tensor]:
    """Gradients with a common direction, noise, and sizes over so many powers of ten."""
    direction, spread = torch.randn(size), torch.logspace(-decades, 0, size)[torch.randperm(size)]
    return [(direction + torch.randn(size)) * spread for _ in range(steps)]


def check_adamw(size: int, steps: int) -> None:
    """Against torch's in float64, as near as torch's in fp32 is."""
    start = torch.randn(size)
    oracle, peer = torch.nn.Parameter(start.double()), torch.nn.Parameter(start.clone())
    settings = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    double, single = torch.optim.AdamW([oracle], **settings), torch.optim.AdamW([peer], **settings)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    for step, grad in enumerate(gradients(size, steps), 1):
        oracle.grad, peer.grad = grad.double() * 0.5, grad * 0.5
        double.step()
        single.step()
        adamw_(param, grad, exp_avg, exp_avg_sq, step=step, grad_scale=0.5, **ADAM)
    assert error(param, oracle.detach()) <= max(2 * error(peer.detach(), oracle.detach()), 5e-7)
    assert error(exp_avg_sq, double.state[oracle]["exp_avg_sq"]) < 1e-6


def check_sgd(size: int, steps: int, momentum: float, weight_decay: float) -> None:
    """Against torch's in float64."""
    start = torch.randn(size)
    peer = torch.nn.Parameter(start.double())
    theirs = torch.optim.SGD([peer], lr=0.05, momentum=momentum, weight_decay=weight_decay)
    param, buffer = start.clone(), torch.zeros(size) if momentum else None
    for grad in gradients(size, steps):
        peer.grad = grad.double() * 0.5
        theirs.step()
        sgd_(param, grad, buffer, lr=0.05, momentum=momentum, weight_decay=weight_decay, grad_scale=0.5)
    assert error(param, peer.detach()) < 1e-6


def check_8bit(spans: list[tuple[int, int, float]], steps: int) -> None:
    """Against the reference; what lies outside of the spans stays."""
    size = spans[-1][1] + 5
    start, given = torch.randn(size), gradients(size, steps)

    def run() -> tuple[torch.Tensor, QuantizedMoments]:
        param, moments = start.clone(), QuantizedMoments.zeros(spans)
        for step, grad in enumerate(given, 1):
            adamw_8bit_(param, grad, moments, step=step, grad_scale=0.5, **ADAM)
        return param, moments

    ours, got = run()
    with use_backend("reference"):
        theirs, want = run()
    assert error(ours, theirs) < 1e-6
    assert torch.allclose(got.m_scale_B, want.m_scale_B, rtol=1e-5, atol=0)
    # A value on the edge of two codes may fall either way.
    for a, b in ((got.m_BE, want.m_BE), (got.v_BE, want.v_BE)):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
    outside = torch.ones(size, dtype=torch.bool)
    for first, last, _ in spans:
        outside[first:last] = False
    assert torch.equal(ours[outside], start[outside]) and bool(outside.any())


def check_8bit_only_decays() -> None:
    """A gradient of zero leaves the moments' codes and scales."""
    param, moments = torch.ones(300), QuantizedMoments.zeros([(0, 300, 1.0)])
    codes = moments.m_BE.clone(), moments.v_BE.clone()
    adamw_8bit_(param, torch.zeros(300), moments, step=1, **ADAM)
    assert torch.equal(param, torch.full((300,), 1 - ADAM["lr"] * ADAM["weight_decay"]))
    assert torch.equal(moments.m_BE, codes[0]) and torch.equal(moments.v_BE, codes[1])
    assert not moments.m_scale_B.any() and not moments.v_scale_B.any()
