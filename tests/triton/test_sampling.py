from __future__ import annotations

import math

import pytest
import torch

from coserve.core.sampling_params import SamplingParams
from coserve.kernels.dispatch import use_backend
from coserve.kernels.sampling import Choices, choose_tokens, penalize_, token_logprobs
from coserve.worker.sampler import SamplingRow, sample
from tests.kernels.oracle import INTERPRETED_DTYPES
from tests.kernels.test_sampling import by_definition, choices, vocabulary

FILTERS = [(0, 1.0, 0.0), (7, 1.0, 0.0), (40, 0.8, 0.0), (200, 0.9, 0.02), (0, 0.9, 0.0), (0, 0.5, 0.1)]


@pytest.mark.parametrize("kind", ["flat", "usual", "ties", "masked"])
def test_choices_follow_the_definition(kind: str) -> None:
    for place, filters in enumerate(FILTERS):
        V, numbers = (17, 257, 2100, 1, 3001, 64)[place], [(0.0, 0.6, 1.0 - 2.0**-53)[place % 3]]
        logits = vocabulary(kind, 1, V, INTERPRETED_DTYPES[place % 2])
        temperature = (1.0, 0.3, 1.7)[place % 3]
        got = choose_tokens(logits, choices(1, temperature, filters, numbers)).tolist()
        for token, number in zip(got, numbers, strict=True):
            kept = by_definition(logits[0].float(), temperature, filters)
            assert kept.allows(token, number, 2e-6), (V, filters)


def test_large_vocabularies_choose_as_the_reference_does() -> None:
    logits = 3 * torch.randn(1, 20_000)
    for filters in ((0, 1.0, 0.0), (50, 0.9, 0.0)):
        asked = choices(1, 0.9, filters, [0.3])
        with use_backend("reference"):
            wants = choose_tokens(logits, asked)
        assert torch.equal(choose_tokens(logits, asked), wants)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_greedy_takes_the_first_of_the_largest(dtype: torch.dtype) -> None:
    V = 2500
    logits = torch.full((4, V), -math.inf)
    for row, first in enumerate((0, 7, 2047, 2048)):
        logits[row, : first + 1] = -1.0
        logits[row, first:] = 2.0
    logits[3, -1] = 7.0
    got = choose_tokens(logits.to(dtype), choices(4, 0.0, (0, 1.0, 0.0), [0.5])).tolist()
    assert got == [0, 7, 2047, V - 1]


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.randn(35, 60)[:, :50]
    asked = choices(35, 1.0, (0, 0.9, 0.0), [0.6])
    asked = asked._replace(temperature_R=0.8 * (torch.arange(35, dtype=torch.float64) % 11 == 0))
    whole = choose_tokens(logits, asked)
    for index in (0, 7, 33):
        one = Choices(*(tensor[index : index + 1] for tensor in asked))
        assert choose_tokens(logits, one).tolist() == [int(whole[index])]
    assert choose_tokens(logits, Choices(*(tensor[:0] for tensor in asked))).shape == (0,)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_logprobs_match_float64(dtype: torch.dtype) -> None:
    for kind, V in (("flat", 5), ("usual", 4097), ("ties", 300)):
        logits = vocabulary(kind, 4, V, dtype)
        rows, targets = torch.tensor([3, 0, 2]), torch.tensor([V - 1, 0, V // 2])
        for top in (0, 5):
            found = token_logprobs(logits, rows, targets, top)
            wanted = logits[rows].double().log_softmax(-1)
            own = wanted.gather(1, targets[:, None])
            order = wanted.sort(descending=True, stable=True)
            assert torch.allclose(found.logprobs_R.double(), own[:, 0], rtol=1e-6, atol=2e-6)
            assert torch.equal(found.ranks_R, (wanted > own).sum(-1) + 1)
            assert torch.equal(found.top_ids_RK, order.indices[:, :top])
            best = order.values[:, :top]
            assert torch.allclose(found.top_logprobs_RK.double(), best, rtol=1e-6, atol=2e-6)


def test_alternatives_end_where_nothing_has_a_probability() -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, [7, 200]] = torch.tensor([1.0, 2.0])
    found = token_logprobs(logits, torch.tensor([0]), torch.tensor([7]), 4)
    assert found.top_ids_RK.tolist() == [[200, 7, -1, -1]] and found.ranks_R.tolist() == [2]


def test_penalties_are_those_of_the_reference() -> None:
    tokens = torch.tensor([5, 5, 9, 40, 9, 9, 70, 99])
    logits = 3 * torch.randn(100)
    for how in ((3, 1.3, 0.5, 0.2), (0, 0.7, 0.0, 1.0), (8, 2.0, 1.0, 1.0)):
        got, want = logits.clone(), logits.clone()
        penalize_(got, tokens, *how)
        with use_backend("reference"):
            penalize_(want, tokens, *how)
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[:5], logits[:5])
    penalize_(logits, tokens[:0], 0, 2.0, 1.0, 1.0)


def test_the_sampler_chooses_as_on_the_cpu() -> None:
    """Penalties, bias, bans and log-probabilities together, through the worker's sampler."""
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, **params), [1, 2, 3, 2], 2, frozenset({5}))
        for params in (
            {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 2},
            {"temperature": 0.8, "seed": 3, "top_p": 0.9, "presence_penalty": 1.0, "min_tokens": 4},
            {"temperature": 1.2, "seed": 4, "logit_bias": {7: 3.0}, "logprobs": 0},
            {"temperature": 1.0, "seed": 5, "top_k": 2, "allowed_token_ids": (4, 8, 9)},
        )
    ]
    logits = 2 * torch.randn(4, 60)
    got = sample(logits.clone(), rows)
    with use_backend("reference"):
        want = sample(logits.clone(), rows)
    assert got.token_ids == want.token_ids
    for found, wanted in zip(got.logprobs, want.logprobs, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.rank == wanted.rank and [i for i, _ in found.top] == [i for i, _ in wanted.top]
            assert found.logprob == pytest.approx(wanted.logprob, abs=2e-6)


def test_logits_without_rows_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        choose_tokens(torch.randn(10, 2).t(), choices(2, 1.0, (0, 1.0, 0.0), [0.5]))
    with pytest.raises(ValueError, match="logits"):
        penalize_(torch.randn(20)[::2], torch.tensor([1]), 0, 2.0, 0.0, 0.0)
