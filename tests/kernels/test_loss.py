from __future__ import annotations

import pytest
import torch

from coserve.kernels.cross_entropy import logit_gradient_, token_scores
from tests.kernels.oracle import DTYPES, check, error


def check_scores(C: int, V: int, dtype: torch.dtype, softcap: float) -> None:
    """Scores and gradient of logits [C, V] against float64."""
    logits, targets = (5 * torch.randn(C, V)).to(dtype), torch.randint(0, V, (C,))
    weight, uniform = torch.randn(C), torch.rand(C) * (torch.arange(C) % 2)
    if softcap:
        logits = (softcap * torch.tanh(logits / softcap)).to(dtype)

    def run(logits):  # type: ignore[no-untyped-def]
        scores = token_scores(logits, targets)
        logit_gradient_(logits, targets, scores.lse_C, weight, uniform, softcap)
        return *(score.float() for score in scores), logits

    check(run, logits)


@pytest.mark.parametrize(("C", "V"), [(1, 1), (1, 7), (4, 50), (9, 3000)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_scores_and_gradient(isa: str, C: int, V: int, dtype: torch.dtype, softcap: float) -> None:
    check_scores(C, V, dtype, softcap)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_gradient_is_that_of_signed_weights_and_smoothed_labels(isa: str, softcap: float) -> None:
    raw, targets = 4 * torch.randn(7, 90), torch.randint(0, 90, (7,))
    weight, uniform = torch.tensor([1.0, -2.0, 0.0, 0.5, -0.1, 0.0, 3.0]), torch.rand(7)
    uniform[2] = 0.0
    with torch.enable_grad():
        leaf = raw.double().requires_grad_()
        z = softcap * torch.tanh(leaf / softcap) if softcap else leaf
        logp = z.log_softmax(-1)
        own = logp.gather(1, targets[:, None]).squeeze(1)
        (want,) = torch.autograd.grad(-(weight * own + uniform * logp.mean(-1)).sum(), leaf)
    logits = (softcap * torch.tanh(raw / softcap) if softcap else raw).clone()
    scores = token_scores(logits, targets)
    assert error(scores.logprob_C, own.detach()) < 2e-6
    assert error(scores.mean_logprob_C, logp.detach().mean(-1)) < 2e-6
    logit_gradient_(logits, targets, scores.lse_C, weight, uniform, softcap)
    assert error(logits, want) < 2e-6
    assert not logits[2].any()


def test_scores_of_extreme_logits(isa: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 3.0, float("-inf")]])
    targets = torch.tensor([1, 1])
    scores = token_scores(logits, targets)
    assert torch.equal(scores.logprob_C, torch.tensor([-2e4, 0.0]))
    logit_gradient_(logits, targets, scores.lse_C, torch.ones(2), torch.zeros(2))
    assert torch.equal(logits, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_greedy_is_the_first_of_the_largest(isa: str) -> None:
    logits = torch.zeros(4, 40)
    logits[1, 30] = logits[1, 31] = 2.0
    logits[2, 3] = float("nan")
    targets = torch.tensor([0, 31, 3, 7])
    assert token_scores(logits, targets).greedy_C[[0, 1, 3]].tolist() == [True, False, False]
    assert token_scores(logits[1:2], torch.tensor([30])).greedy_C.tolist() == [True]
    assert token_scores(logits, targets).logprob_C.isnan().tolist() == [False, False, True, False]


def test_targets_outside_the_vocabulary_are_refused() -> None:
    for target in (3, -100):
        with pytest.raises(ValueError, match="vocabulary of 3"):
            token_scores(torch.zeros(1, 3), torch.tensor([target]))
