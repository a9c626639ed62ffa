from __future__ import annotations

import pytest
import torch

from coserve.kernels.adamw import adamw_
from coserve.kernels.linear import PackedLinear
from coserve.kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy
from tests.kernels.oracle import DTYPES, check, error


@pytest.mark.parametrize(("C", "V"), [(1, 1), (1, 7), (4, 50), (9, 3000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(isa: str, C: int, V: int, dtype: torch.dtype) -> None:
    logits, targets = (5 * torch.randn(C, V)).to(dtype), torch.randint(0, V, (C,))
    if C > 2:
        targets[1] = -100

    def run(logits):  # type: ignore[no-untyped-def]
        losses = cross_entropy_(logits, targets, 0.5)
        return losses, logits

    check(run, logits)


def test_cross_entropy_of_extreme_logits(isa: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 3.0, float("-inf")]])
    losses = cross_entropy_(logits, torch.tensor([1, 1]), 1.0)
    assert torch.equal(losses, torch.tensor([2e4, 0.0]))
    assert torch.equal(logits, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_cross_entropy_refuses_targets_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary of 3"):
        cross_entropy_(torch.zeros(1, 3), torch.tensor([3]), 1.0)


@pytest.mark.parametrize("chunk", (1, 5, 64))
def test_linear_cross_entropy_matches_autograd(isa: str, chunk: int) -> None:
    h, weight, targets = torch.randn(20, 24), torch.randn(90, 24), torch.randint(0, 90, (20,))
    targets[[0, 7, 19]] = -100
    with torch.enable_grad():
        leaf = h.double().requires_grad_()
        wants = torch.nn.functional.cross_entropy(leaf @ weight.double().t(), targets, reduction="none")
        (dh_want,) = torch.autograd.grad(wants.sum() / 17, leaf)
    losses, dh = linear_cross_entropy(h, PackedLinear(weight), targets, 1 / 17, chunk)
    assert error(losses, wants.detach()) < 2e-6
    assert error(dh, dh_want) < 2e-6
    assert not dh[[0, 7, 19]].any() and not losses[[0, 7, 19]].any()


def test_linear_cross_entropy_does_not_depend_on_chunks(isa: str) -> None:
    h, head, targets = torch.randn(70, 24), PackedLinear(torch.randn(90, 24)), torch.randint(0, 90, (70,))
    losses, dh = linear_cross_entropy(h, head, targets, 1.0, 64)
    again, dh_again = linear_cross_entropy(h, head, targets, 1.0, 7)
    assert torch.equal(losses, again) and torch.equal(dh, dh_again)


@pytest.mark.parametrize("size", (1, 37, 20000))
def test_adamw_matches_torch(isa: str, size: int) -> None:
    start = torch.randn(size)
    oracle = torch.nn.Parameter(start.double())
    peer = torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    double, single = torch.optim.AdamW([oracle], **settings), torch.optim.AdamW([peer], **settings)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    for step in range(1, 6):
        grad = torch.randn(size)
        oracle.grad, peer.grad = grad.double() * 0.5, grad * 0.5
        double.step()
        single.step()
        adamw_(
            param, grad, exp_avg, exp_avg_sq,
            lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1, step=step, grad_scale=0.5,
        )  # fmt: skip
    assert error(param, oracle.detach()) <= max(2 * error(peer.detach(), oracle.detach()), 5e-7)
    assert error(exp_avg_sq, double.state[oracle]["exp_avg_sq"]) < 1e-6


def test_adamw_refuses_other_dtypes() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg must"):
        adamw_(
            x,
            x,
            x.bfloat16(),
            x,
            lr=1.0,
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            weight_decay=0.0,
            step=1,
            grad_scale=1.0,
        )
