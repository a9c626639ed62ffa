"""Scores and gradients of logits in the interpreter."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.cross_entropy import logit_gradient_, token_scores
from coserve.kernels.triton import cross_entropy as file
from coserve.kernels.triton.tuning import override
from tests.kernels.oracle import INTERPRETED_DTYPES
from tests.kernels.test_loss import check_scores

SMALL = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(("C", "V"), [(1, 1), (4, 50), (5, 64), (3, 300)])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("soft_cap", [0.0, 4.0])
def test_scores_and_gradient(C: int, V: int, dtype: torch.dtype, soft_cap: float) -> None:
    with override(file.TUNED, SMALL):
        check_scores(C, V, dtype, soft_cap)


def test_scores_of_extreme_logits() -> None:
    least = float("-inf")
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 3.0, least], [least, least, 1.0]]).repeat(1, 30)
    targets = torch.tensor([1, 1, 2])
    with override(file.TUNED, SMALL | {"BLOCK": 2}):
        scores = token_scores(logits, targets)
    assert torch.allclose(scores.lse_C, logits.logsumexp(1))
    assert torch.allclose(scores.logprob_C, logits.log_softmax(1)[torch.arange(3), targets])
    assert scores.greedy_C.tolist() == [False, True, True]


def test_greedy_is_the_first_of_the_largest_and_nan_is_seen() -> None:
    logits = torch.zeros(4, 140)
    logits[1, 30] = logits[1, 100] = 2.0
    logits[2, 3] = float("nan")
    with override(file.TUNED, SMALL):
        scores = token_scores(logits, torch.tensor([0, 100, 5, 7]))
        assert token_scores(logits[1:2], torch.tensor([30])).greedy_C.tolist() == [True]
    assert scores.greedy_C[[0, 1, 3]].tolist() == [True, False, False]
    assert scores.logprob_C.isnan().tolist() == [False, False, True, False]


def test_a_target_outside_the_vocabulary_has_no_score() -> None:
    """On a device nobody asks for it beforehand."""
    assert file.token_scores(torch.zeros(2, 3), torch.tensor([3, -100])).logprob_C.isnan().all()


def test_no_rows_and_what_does_not_fit() -> None:
    none = torch.empty(0)
    assert token_scores(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).lse_C.shape == (0,)
    logit_gradient_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), none, none, none)
    with pytest.raises(ValueError, match="contiguous"):
        token_scores(torch.zeros(3, 3).t()[:, :2], torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="int64"):
        token_scores(torch.zeros(2, 3), torch.tensor([0, 1]).int())
    one = torch.zeros(2)
    with pytest.raises(ValueError, match="fp32 values for 2 rows"):
        logit_gradient_(torch.zeros(2, 3), torch.tensor([0, 1]), one, one.double(), one)
