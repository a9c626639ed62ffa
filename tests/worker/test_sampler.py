"""The sampler against plain per-row references in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.sampling_params import SamplingParams
from coserve.kernels import dispatch, sampling
from coserve.kernels.dispatch import native_replaced
from coserve.kernels.sampling import candidates, keep_allowed_
from coserve.worker.sampler import SamplingRow, sample, score, uniform

V = 50


def row(token_ids=(1, 2, 3), prompt=3, stop_ids=(), **params):
    params = {"max_tokens": 10, **params}
    return SamplingRow(SamplingParams(**params), list(token_ids), prompt, frozenset(stop_ids))


def random_logits(seed, rows=1, vocab=V, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


def kept_reference(logits, temperature, top_k, top_p, min_p):
    """Ids that survive, by definition: vLLM's order, ties to the lowest id."""
    scaled = [x / temperature for x in logits]
    best = max(scaled)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    order = [i for i in order if not min_p or math.exp(scaled[i] - best) >= min_p * (1 - 1e-6)]
    order = order[: top_k or None]
    if top_p >= 1:
        return order
    weights = [math.exp(scaled[i] - best) for i in order]
    total, kept, before = sum(weights), [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if before >= top_p * total:
            break
        kept.append(i)
        before += weight
    return kept


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 49, 50, 80]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=150)
def test_filters_keep_what_the_definition_keeps(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed)[0]
    scaled = (logits - logits.max()) / temperature
    ids, values = candidates(scaled, top_k, top_p, min_p)
    expected = kept_reference(scaled.double().tolist(), 1.0, top_k, top_p, min_p)
    assert ids.tolist() == expected
    assert torch.equal(values, scaled[ids])


def test_equal_logits_go_to_the_lowest_ids():
    scaled = torch.zeros(V)
    assert candidates(scaled, 3, 1.0, 0.0)[0].tolist() == [0, 1, 2]
    assert candidates(scaled, 0, 0.1, 0.0)[0].tolist() == [0, 1, 2, 3, 4]
    assert sample(torch.zeros(2, V), [row(temperature=0.0), row(temperature=0.0)]).token_ids == [0, 0]


def test_top_p_widens_its_search_in_a_flat_vocabulary():
    logits = random_logits(1, vocab=4000, scale=0.01)[0]
    scaled = logits - logits.max()
    ids, _ = candidates(scaled, 0, 0.9, 0.0)
    expected = kept_reference(scaled.double().tolist(), 1.0, 0, 0.9, 0.0)
    assert abs(len(ids) - len(expected)) <= 1
    assert ids.tolist()[:3000] == expected[:3000]


def chi_square(params, logits, expected, draws=1500):
    """Pearson's statistic of draws at `draws` positions, and its degrees of freedom."""
    rows = [row(range(position), position, seed=7, **params) for position in range(1, draws + 1)]
    tokens = sample(logits.expand(draws, -1).clone(), rows).token_ids
    counts = torch.bincount(torch.tensor(tokens), minlength=len(logits)).double()
    assert float(counts[expected == 0].sum()) == 0
    wanted = expected[expected > 0] * draws
    return float(((counts[expected > 0] - wanted) ** 2 / wanted).sum()), int((expected > 0).sum()) - 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 6},
        {"temperature": 1.3, "top_p": 0.8},
    ],
    ids=["plain", "cool", "top-k", "top-p"],
)
def test_draws_follow_the_distribution(params):
    logits = random_logits(3, vocab=12, scale=1.0)[0]
    scaled = logits.double() / params["temperature"]
    kept = kept_reference(scaled.tolist(), 1.0, params.get("top_k", 0), params.get("top_p", 1.0), 0.0)
    mask = torch.full_like(scaled, -math.inf)
    mask[kept] = scaled[kept]
    statistic, freedom = chi_square(params, logits, torch.softmax(mask, dim=-1))
    # mean f, standard deviation sqrt(2 f): five of them is one in a million
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_numbers_are_a_hash_of_seed_and_position():
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(numbers)) == 2000 and all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert uniform(-1, 5) == uniform(2**64 - 1, 5) and uniform(3, 5) == uniform(3, 5)


@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=40)
def test_a_row_does_not_depend_on_its_batch(seed, data):
    settings_ = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.7, 1.0]),
            "top_k": st.sampled_from([0, 4]),
            "top_p": st.sampled_from([0.8, 1.0]),
            "seed": st.integers(0, 99),
            "repetition_penalty": st.sampled_from([1.0, 1.2]),
            "logprobs": st.sampled_from([None, 0, 3]),
        }
    )
    rows = [row(**params) for params in data.draw(st.lists(settings_, min_size=1, max_size=6))]
    logits = random_logits(seed, len(rows))
    together = sample(logits.clone(), rows)
    for index, one in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [one])
        assert alone.token_ids == together.token_ids[index : index + 1]
        assert alone.logprobs == together.logprobs[index : index + 1]


def test_rows_of_a_large_vocabulary_do_not_depend_on_their_batch():
    logits = random_logits(5, 9, vocab=40_000, scale=1.0)
    rows = [row(temperature=1.0, seed=seed, logprobs=2) for seed in range(9)]
    together = sample(logits.clone(), rows)
    for index in range(9):
        alone = sample(logits[index : index + 1].clone(), rows[index : index + 1])
        assert alone.token_ids[0] == together.token_ids[index]
        assert alone.logprobs[0] == together.logprobs[index]


def adjusted_reference(logits, one):
    """Penalties and bias by their formulas, token by token."""
    params, output = one.params, list(one.token_ids)[one.num_prompt_tokens :]
    values = logits.double().tolist()
    for token in range(len(values)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            values[token] = -math.inf
        if len(output) < params.min_tokens and token in one.stop_ids:
            values[token] = -math.inf
        values[token] += params.logit_bias.get(token, 0.0)
        if token in one.token_ids:
            penalty = params.repetition_penalty
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        count = output.count(token)
        values[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return values


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {4: 6.0, 9: -100.0}},
        {"logit_bias": {7: 100.0}},
        {"allowed_token_ids": (3, 30, 31)},
        {"min_tokens": 5},
        {"min_tokens": 5, "allowed_token_ids": (3, 30, 31), "logit_bias": {3: 50.0}},
    ],
)
def test_adjustments_match_their_formulas(params):
    for seed in range(8):
        logits = random_logits(seed)
        one = row([1, 4, 5, 9, 9, 9, 4], 3, stop_ids=(3, int(logits.argmax())), temperature=0.0, **params)
        expected = adjusted_reference(logits[0], one)
        got = logits.clone()
        token = sample(got, [one]).token_ids[0]
        assert token == max(range(V), key=lambda i: expected[i])
        assert torch.allclose(got[0].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_min_tokens_gives_in_when_only_end_tokens_are_allowed():
    one = row(stop_ids=(3, 8), min_tokens=2, allowed_token_ids=(3,), temperature=0.0)
    assert sample(random_logits(0), [one]).token_ids == [3]


def test_min_tokens_bans_end_tokens_only_until_reached():
    logits = random_logits(0)
    best = int(logits.argmax())
    banned = row([1, 2], 1, stop_ids=(best,), min_tokens=2, temperature=0.0)
    free = row([1, 2, 2], 1, stop_ids=(best,), min_tokens=2, temperature=0.0)
    assert sample(logits.repeat(2, 1), [banned, free]).token_ids[0] != best
    assert sample(logits.repeat(2, 1), [banned, free]).token_ids[1] == best


def test_logprobs_are_those_of_the_raw_logits():
    logits = random_logits(2)
    one = row(temperature=0.5, top_k=1, logit_bias={20: 100.0}, logprobs=4)
    result = sample(logits.clone(), [one])
    reference = torch.log_softmax(logits[0].double(), dim=-1)
    entry = result.logprobs[0]
    assert result.token_ids == [20] and entry.token_id == 20
    assert entry.logprob == pytest.approx(float(reference[20]), abs=1e-5)
    assert entry.rank == int((reference > reference[20]).sum()) + 1
    best = reference.topk(4)
    assert [token for token, _ in entry.top] == best.indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_without_alternatives_and_none():
    result = sample(random_logits(2, 2), [row(temperature=0.0, logprobs=0), row(temperature=0.0)])
    assert result.logprobs[0].top == [] and result.logprobs[0].rank == 1
    assert result.logprobs[1] is None


def test_equal_alternatives_come_by_id():
    entry = score(torch.zeros(1, V), [30], 3)[0]
    assert [token for token, _ in entry.top] == [0, 1, 2]
    assert entry.rank == 1 and entry.logprob == pytest.approx(-math.log(V))


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 100.0])
def test_extreme_temperatures_stay_finite(temperature):
    logits = random_logits(4, scale=30.0)
    tokens = sample(
        logits.repeat(2, 1), [row(temperature=temperature, seed=1), row(temperature=temperature, top_p=0.9)]
    ).token_ids
    assert all(0 <= token < V for token in tokens)
    if temperature < 1:
        assert tokens == [int(logits.argmax())] * 2


def test_masked_tokens_are_never_drawn():
    logits = torch.full((200, V), -math.inf)
    logits[:, [4, 40]] = 0.0
    rows = [row(temperature=1.0, seed=seed, top_p=0.99 if seed % 2 else 1.0) for seed in range(200)]
    assert set(sample(logits, rows).token_ids) == {4, 40}


def test_named_alternatives_come_in_their_order():
    logits = random_logits(2)
    reference = torch.log_softmax(logits[0].double(), dim=-1)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        one = row(temperature=0.0, logprobs=1, logprob_token_ids=(7, 3), logit_bias={7: 1.0})
        (entry,) = sample(logits.clone().to(dtype), [one]).logprobs
        assert [token for token, _ in entry.top] == [7, 3]
        assert [value for _, value in entry.top] == pytest.approx(reference[[7, 3]].tolist(), abs=within)


@given(
    seed=st.integers(0, 1000),
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
)
def test_bad_words_never_come_whole(seed, words):
    """Of four tokens some word is begun all the time, also by the prompt, which doesn't count."""
    logits = torch.full((1, V), -math.inf)
    logits[:, :4] = random_logits(seed, vocab=4)
    output = []
    for _ in range(12):
        one = row([*(word[0] for word in words), *output], len(words), bad_words=tuple(words), seed=seed)
        (token,) = sample(logits.clone(), [one]).token_ids
        output.append(token)
    assert not {tuple(output[start:end]) for start in range(12) for end in range(start + 1, 13)} & {*words}


def test_a_bad_word_gives_in_when_nothing_else_is_allowed():
    one = row(bad_words=((3,),), allowed_token_ids=(3,), temperature=0.0)
    assert sample(random_logits(0), [one]).token_ids == [3]


MASKED = {
    "greedy": {"temperature": 0.0},
    "open": {"temperature": 1.3},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {3: 5.0, 4: -100.0}},
    "named": {"logprob_token_ids": (5, 2)},
}


def masked_row(banned, **params):
    """A row whose grammar bans these tokens."""
    bits = torch.cat([~banned, torch.zeros(64 - V, dtype=torch.bool)]).numpy()
    allowed = np.packbits(bits, bitorder="little").view(np.uint32)
    return replace(row((1, 2, 3, 7, 7), 3, **params), allowed=allowed)


@pytest.mark.parametrize("params", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.1, 0.5, 0.98]))
@settings(max_examples=15, deadline=None)
def test_a_masked_row_is_one_whose_banned_logits_are_gone(params, dtype, native, seed, share):
    """Equal to the same settings over logits that hold minus infinity there, and the rows beside it don't
    change; log-probabilities are those of the raw logits."""
    generator = torch.Generator().manual_seed(seed)
    banned = torch.rand(V, generator=generator) < share
    banned[seed % V] = False
    logits = random_logits(seed, rows=3).to(dtype)
    free = row(seed=1), row(temperature=0.0)
    params = {"seed": seed, "logprobs": 2, **params}
    with native_replaced(dispatch.native if native else None):
        found = sample(logits.clone(), [free[0], masked_row(banned, **params), free[1]])
        alone = sample(logits[[0, 2]].clone(), list(free))
        gone = logits.clone()
        gone[1, banned] = -math.inf
        expected = sample(gone, [free[0], row((1, 2, 3, 7, 7), 3, **params), free[1]])
        raw = score(logits[1:2], [found.token_ids[1]], 2)
    assert not banned[found.token_ids[1]]
    assert found.token_ids == expected.token_ids
    assert [found.token_ids[0], found.token_ids[2]] == alone.token_ids
    assert found.logprobs[1]._replace(top=[]) == raw[0]._replace(top=[])
    assert found.logprobs[1].top == expected_top(logits[1], raw[0], params)


def expected_top(logits, raw, params):
    named = params.get("logprob_token_ids")
    if named is None:
        return raw.top
    wide = logits.float()
    return [(token, float(wide[token] - wide.logsumexp(dim=-1))) for token in named]


@pytest.mark.parametrize("vocab", [1, 31, 32, 50, 64])
def test_a_mask_of_bits_leaves_what_is_allowed(vocab):
    generator = torch.Generator().manual_seed(vocab)
    allowed = torch.rand(64, generator=generator) < 0.3
    words = np.packbits(allowed.numpy(), bitorder="little").view(np.uint32)
    logits = random_logits(vocab, vocab=vocab)[0]
    expected = logits.masked_fill(~allowed[:vocab], -math.inf)
    for keep in (keep_allowed_, sampling._keep_allowed_reference_):
        found = logits.clone()
        keep(found, words)
        assert torch.equal(found, expected)


def test_settings_that_leave_nothing_of_a_mask_give_in():
    logits, end, stop = random_logits(2), 9, 8
    banned = torch.ones(V, dtype=torch.bool)
    banned[[end, stop]] = False

    def choice(**params):
        held = masked_row(banned, **params)
        held = replace(held, stop_ids=frozenset({end, stop}), end_ids=frozenset({end}))
        return sample(logits.clone(), [held]).token_ids[0]

    assert choice(ignore_eos=True, temperature=0.0) == stop
    assert choice(allowed_token_ids=(end, 20), temperature=0.0) == end
    assert choice(bad_words=((end,),), temperature=0.0) == stop
    assert choice(min_tokens=50) in (end, stop) and choice(allowed_token_ids=(20, 21)) in (end, stop)
