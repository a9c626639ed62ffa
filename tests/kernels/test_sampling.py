"""Choice of tokens, log-probabilities and penalties against their definitions in float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from coserve.kernels.dispatch import use_backend
from coserve.kernels.sampling import Choices, choose_tokens, penalize_, token_logprobs
from tests.kernels.oracle import DTYPES

SIZES = (1, 2, 17, 256, 257, 1501)
NUMBERS = (0.0, 0.01, 0.3, 0.77, 0.999, 1.0 - 2.0**-53)
FILTERS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (40, 0.8, 0.0),
    (200, 0.9, 0.02),
    (5000, 1.0, 0.0),
    (0, 0.05, 0.0),
    (0, 0.9, 0.0),
    (0, 0.9999, 0.0),
    (0, 1.0, 0.1),
    (0, 0.5, 0.5),
]


def choices(
    rows: int, temperature: float, filters: tuple[int, float, float], numbers: list[float]
) -> Choices:
    """Every row of `rows` with every number."""
    top_k, top_p, min_p = filters
    n = rows * len(numbers)
    double = {"dtype": torch.float64}
    return Choices(
        torch.arange(rows).repeat_interleave(len(numbers)),
        torch.full((n,), temperature, **double),
        torch.full((n,), top_k),
        torch.full((n,), top_p, **double),
        torch.full((n,), min_p, **double),
        torch.tensor(numbers * rows, **double),
    )


class Kept(NamedTuple):
    """Ids in the order of their CDF and its borders [n + 1]; how many top_p keeps (one number, or more where
    rounding decides)."""

    ids: list[int]
    borders: list[float]
    counts: list[int]

    def allows(self, token: int, number: float, slack: float) -> bool:
        """Whether `number` points at `token`, to within `slack` of the whole."""
        place = self.ids.index(token)
        low, high = self.borders[place : place + 2]
        totals = [self.borders[count] for count in self.counts if place < count]
        return any(low - slack * total <= number * total <= high + slack * total for total in totals)


def by_definition(z: torch.Tensor, temperature: float, filters: tuple[int, float, float]) -> Kept:
    """What the filters keep of fp32 logits."""
    top_k, top_p, min_p = filters
    scaled = ((z - z.max()) / temperature).double().tolist()
    ids = [i for i in range(len(scaled)) if scaled[i] > -math.inf]
    if filters != (0, 1.0, 0.0):
        ids.sort(key=lambda i: (-scaled[i], i))
        floor = float(torch.tensor(math.log(min_p))) if min_p else -math.inf
        ids = [i for i in ids if scaled[i] >= floor][: top_k or None]
    borders = [0.0, *itertools.accumulate(math.exp(scaled[i]) for i in ids)]
    if top_p == 1.0:
        return Kept(ids, borders, [len(ids)])
    low, high = (top_p * borders[-1] * (1 + side * 1e-6) for side in (-1, 1))
    return Kept(
        ids, borders, [n for n in range(1, len(borders)) if borders[n] >= low and borders[n - 1] < high]
    )


def vocabulary(kind: str, rows: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    z = {"flat": 0.02, "usual": 3.0, "peaked": 12.0}.get(kind, 1.0) * torch.randn(rows, V)
    if kind == "ties":
        z = torch.randint(-2, 3, (rows, V)).float()
    if kind == "masked":
        z[torch.rand(rows, V) < 0.7] = -math.inf
        z[:, V // 2] = 0.5
    return z.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["flat", "usual", "peaked", "ties", "masked"])
def test_choices_follow_the_definition(isa: str, kind: str, dtype: torch.dtype) -> None:
    clear = checked = 0
    for V in SIZES:
        logits = vocabulary(kind, 2, V, dtype)
        for place, filters in enumerate(FILTERS):
            temperature = (1.0, 0.3, 1.7)[place % 3]
            got = choose_tokens(logits, choices(2, temperature, filters, list(NUMBERS))).tolist()
            for row in (0, 1):
                kept = by_definition(logits[row].float(), temperature, filters)
                for number, token in zip(NUMBERS, got[row * len(NUMBERS) :], strict=False):
                    assert kept.allows(token, number, 2e-6), (V, filters, number)
                    clear += kept.allows(token, number, -2e-6)
                    checked += 1
    assert clear > 0.4 * checked


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_first_of_the_largest(isa: str, dtype: torch.dtype) -> None:
    for V in SIZES:
        logits = torch.full((V, V) if V < 300 else (3, V), -math.inf)
        for row, z in enumerate(logits):
            z[: row + 1] = -1.0
            z[row:] = 2.0
        logits[-1, -1] = 7.0
        got = choose_tokens(logits.to(dtype), choices(len(logits), 0.0, (0, 1.0, 0.0), [0.5])).tolist()
        assert got == [*range(len(logits) - 1), V - 1]


def test_large_vocabularies_choose_as_the_reference_does(isa: str) -> None:
    V = 40_000
    logits = torch.cat([scale * torch.randn(2, V) for scale in (0.1, 1.0, 4.0)])
    for filters in ((0, 1.0, 0.0), (50, 0.9, 0.0), (20_000, 1.0, 0.0), (0, 0.97, 0.0), (0, 1.0, 0.3)):
        asked = choices(6, 0.9, filters, [0.03, 0.5, 0.9])
        with use_backend("reference"):
            wants = choose_tokens(logits, asked)
        assert torch.equal(choose_tokens(logits, asked), wants)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(isa: str, dtype: torch.dtype) -> None:
    padded = torch.randn(9, 5000).to(dtype)
    logits = padded[:, :4001]
    before = torch.get_num_threads()
    for filters in ((0, 1.0, 0.0), (30, 1.0, 0.0), (0, 0.9, 0.0)):
        asked = choices(9, 1.0, filters, [0.1, 0.6])
        whole = choose_tokens(logits, asked)
        torch.set_num_threads(3)
        assert torch.equal(choose_tokens(logits, asked), whole)
        torch.set_num_threads(before)
        for index in (0, 7, 17):
            one = Choices(*(tensor[index : index + 1] for tensor in asked))
            assert choose_tokens(logits, one).tolist() == [int(whole[index])]
        row = logits[5:6].clone()
        assert torch.equal(choose_tokens(row, choices(1, 1.0, filters, [0.1, 0.6])), whole[10:12])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_match_float64(isa: str, dtype: torch.dtype) -> None:
    for kind in ("flat", "usual", "peaked", "ties"):
        for V in SIZES:
            logits = vocabulary(kind, 4, V, dtype)
            rows, targets = torch.tensor([3, 0, 2]), torch.tensor([V - 1, 0, V // 2])
            for top in (0, 1, 5, 300):
                found = token_logprobs(logits, rows, targets, top)
                wanted = logits[rows].double().log_softmax(-1)
                own = wanted.gather(1, targets[:, None])
                assert torch.allclose(found.logprobs_R.double(), own[:, 0], rtol=1e-6, atol=2e-6)
                assert torch.equal(found.ranks_R, (wanted > own).sum(-1) + 1)
                count = min(top, V)
                assert found.top_ids_RK.shape == (3, count)
                order = wanted.sort(descending=True, stable=True)
                assert torch.equal(found.top_ids_RK, order.indices[:, :count])
                assert torch.allclose(
                    found.top_logprobs_RK.double(), order.values[:, :count], rtol=1e-6, atol=2e-6
                )


def test_alternatives_end_where_nothing_has_a_probability(isa: str) -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, [7, 200]] = torch.tensor([1.0, 2.0])
    found = token_logprobs(logits, torch.tensor([0]), torch.tensor([7]), 4)
    assert found.top_ids_RK.tolist() == [[200, 7, -1, -1]] and found.ranks_R.tolist() == [2]


def test_penalties_match_their_formulas(isa: str) -> None:
    logits = 3 * torch.randn(100)
    tokens = torch.tensor([5, 5, 9, 40, 9, 9, 70, 99])
    for prompt, repetition, presence, frequency in (
        (3, 1.3, 0.5, 0.2),
        (0, 0.7, 0.0, 1.0),
        (8, 2.0, 1.0, 1.0),
    ):
        got = logits.clone()
        penalize_(got, tokens, prompt, repetition, presence, frequency)
        for token in range(100):
            z, count = float(logits[token]), tokens[prompt:].tolist().count(token)
            if token in tokens:
                z = z / repetition if z > 0 else z * repetition
            z -= frequency * count + presence * (count > 0)
            assert float(got[token]) == pytest.approx(z, abs=1e-5)
    untouched = logits.clone()
    penalize_(untouched, tokens[:0], 0, 2.0, 1.0, 1.0)
    assert torch.equal(untouched, logits)


def test_what_does_not_fit_is_refused() -> None:
    logits, asked = torch.randn(2, 10), choices(2, 1.0, (0, 1.0, 0.0), [0.5])
    with pytest.raises(ValueError, match="contiguous"):
        choose_tokens(torch.randn(10, 2).t(), asked)
    with pytest.raises(ValueError, match="row lies outside"):
        choose_tokens(logits[:1], asked)
    with pytest.raises(ValueError, match="settings"):
        choose_tokens(logits, asked._replace(top_k_R=torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="vocabulary"):
        token_logprobs(logits, torch.tensor([0]), torch.tensor([10]), 0)
    with pytest.raises(ValueError, match="vocabulary"):
        penalize_(logits[0], torch.tensor([-1]), 0, 2.0, 0.0, 0.0)
