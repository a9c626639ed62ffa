"""From logits to tokens. A row's result depends on nothing but the row: its logits, its settings, its tokens.

Order: raw log-probabilities are taken (what `logprobs` reports); then allowed ids, the ban on end tokens
before `min_tokens`, logit bias, penalties; greedy rows take the largest logit (of equal ones the lowest id);
the others divide by the temperature, keep what min_p, top_k and then top_p leave, and draw by inverse CDF.
The number drawn is a hash of (seed, position): preemption, batching and training change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from coserve.core.sampling_params import SamplingParams

_MASK64 = (1 << 64) - 1
_CDF_BLOCK = 256
_FLOORS = (-4.0, -6.0, -8.0, -11.0, -14.0, -18.0)  # of scaled logits: how far down top_p looks, step by step


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits and how to choose from it.

    `token_ids` is prompt and output so far, the first `num_prompt_tokens` of them the prompt; `stop_ids` are
    what `min_tokens` bans.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    stop_ids: frozenset[int] = frozenset()

    @property
    def position(self) -> int:
        """Index in the sequence of the token to be sampled."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class TokenLogprob(NamedTuple):
    """Log-probability of a token, its rank (1 = most likely), and the `top` (id, logprob), best first."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class SampledTokens:
    """One token id a row, and its log-probabilities where the row wanted them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
    """Choose one token for each row of fp32 logits [S, V], which are overwritten."""
    raw = {
        index: torch.log_softmax(logits_SV[index], dim=-1)
        for index, row in enumerate(rows)
        if row.params.logprobs is not None
    }
    for index, row in enumerate(rows):
        if _is_adjusted(row):
            _adjust_(logits_SV[index], row)
    token_ids = _choose(logits_SV, rows)
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    for index, logprobs_V in raw.items():
        logprobs[index] = _describe(logprobs_V, token_ids[index], rows[index].params.logprobs or 0)
    return SampledTokens(token_ids, logprobs)


def score(logits_SV: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens (a prompt's own), one for each row of fp32 logits [S, V]."""
    logprobs = torch.log_softmax(logits_SV, dim=-1)
    return [_describe(logprobs[index], target, top) for index, target in enumerate(targets)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a hash of (seed, position): splitmix64 of both (Steele et al. 2014)."""
    mixed = _splitmix64((_splitmix64(seed & _MASK64) + position) & _MASK64)
    return (mixed >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


# ---------------------------------------------------------------- what changes the logits


def _is_adjusted(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.allowed_token_ids
        or params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or row.num_output_tokens < params.min_tokens
    )


def _adjust_(logits_V: torch.Tensor, row: SamplingRow) -> None:
    params = row.params
    allowed = set(params.allowed_token_ids)
    if allowed:
        kept = torch.tensor(sorted(allowed), device=logits_V.device)
        values = logits_V[kept]
        logits_V.fill_(-math.inf)
        logits_V[kept] = values
    # When nothing but end tokens is allowed there is no way to go on: min_tokens gives in.
    if (
        row.num_output_tokens < params.min_tokens
        and row.stop_ids
        and not (allowed and allowed <= row.stop_ids)
    ):
        logits_V[_ids(row.stop_ids, logits_V)] = -math.inf
    if params.logit_bias:
        bias = torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[_ids(params.logit_bias, logits_V)] += bias
    if params.repetition_penalty != 1.0:
        seen = _ids(set(row.token_ids), logits_V)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(
            row.token_ids[row.num_prompt_tokens :], dtype=torch.int64, device=logits_V.device
        )
        ids, counts = torch.unique(output, return_counts=True)
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _ids(
    ids: Sequence[int] | set[int] | frozenset[int] | dict[int, float], like: torch.Tensor
) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)


# ---------------------------------------------------------------- choosing


def _choose(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    greedy = [index for index, row in enumerate(rows) if row.params.greedy]
    if len(greedy) == len(rows):
        return logits_SV.argmax(dim=-1).tolist()
    chosen = [0] * len(rows)
    if greedy:
        for index, token in zip(greedy, logits_SV[greedy].argmax(dim=-1).tolist(), strict=True):
            chosen[index] = token
    for index, row in enumerate(rows):
        if row.params.greedy:
            continue
        if row.params.top_k or row.params.top_p < 1.0 or row.params.min_p:
            chosen[index] = _draw_filtered(logits_SV[index], row)
        else:
            chosen[index] = _draw_open(logits_SV[index], row)
    return chosen


def _draw_open(logits_V: torch.Tensor, row: SamplingRow) -> int:
    """A row without filters: inverse CDF over the whole vocabulary, in order of id.

    Two levels, blocks and then the block's tokens, since cumulating 150k numbers one by one takes 2 ms.
    """
    # The largest logit goes first, so that a tiny temperature can't overflow.
    weights_V = ((logits_V - logits_V.amax()) / row.params.temperature).exp()
    padding = -len(weights_V) % _CDF_BLOCK
    blocks_BC = torch.nn.functional.pad(weights_V, (0, padding)).view(-1, _CDF_BLOCK)
    ends_B = blocks_BC.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = _target(ends_B, uniform(row.params.seed, row.position))
    block = int(torch.searchsorted(ends_B, target, right=True))
    inside_C = blocks_BC[block].double().cumsum(dim=-1)
    rest = target - float(ends_B[block - 1]) if block else target
    within = int(torch.searchsorted(inside_C, min(rest, _target(inside_C, 1.0)), right=True))
    return block * _CDF_BLOCK + within


def _draw_filtered(logits_V: torch.Tensor, row: SamplingRow) -> int:
    scaled = (logits_V - logits_V.amax()) / row.params.temperature
    ids, values = candidates(scaled, row.params.top_k, row.params.top_p, row.params.min_p)
    cdf_C = values.double().exp().cumsum(dim=-1)
    target = _target(cdf_C, uniform(row.params.seed, row.position))
    return int(ids[int(torch.searchsorted(cdf_C, target, right=True))])


def _target(cdf_C: torch.Tensor, number: float) -> float:
    """Where `number` points in an unnormalised fp64 CDF: always below its end, so that a first entry above
    exists, and has a probability."""
    total = float(cdf_C[-1])
    return min(number * total, math.nextafter(total, 0.0))


def candidates(
    scaled_V: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values of the tokens that the filters leave, most likely first, equal ones by id.

    min_p keeps what is at least min_p times as likely as the best; top_k the k likeliest of these (0: all);
    top_p, over what is left (renormalised), the fewest whose probabilities reach it. `scaled` is fp32 [V]
    logits already divided by the temperature, the largest 0.
    """
    floor = -math.inf
    if min_p:
        floor = math.log(min_p)
    if 0 < top_k < len(scaled_V):
        floor = max(floor, float(scaled_V.topk(top_k).values[-1]))
    if floor > -math.inf:
        ids, values = _at_least(scaled_V, floor)
        if top_k:
            ids, values = ids[:top_k], values[:top_k]
        return _nucleus(ids, values, values.double().exp().sum(), top_p)
    return _nucleus_of_all(scaled_V, top_p)


def _nucleus_of_all(scaled_V: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_p` without other filters. Only the likeliest tokens are sorted: those within a factor of the best
    that is widened until they reach `top_p`."""
    weights_V = scaled_V.exp()
    total = weights_V.sum(dtype=torch.float64)
    for floor in _FLOORS:
        reached = weights_V[scaled_V >= floor].sum(dtype=torch.float64)
        if float(reached) >= top_p * float(total):
            return _nucleus(*_at_least(scaled_V, floor), total, top_p)
    return _nucleus(*_at_least(scaled_V, -math.inf), total, top_p)


def _nucleus(
    ids: torch.Tensor, values: torch.Tensor, total: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut descending values after the first whose cumulated probability reaches `top_p`."""
    if top_p >= 1.0:
        return ids, values
    reached = values.double().exp().cumsum(dim=-1) >= top_p * total
    keep = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(ids)
    return ids[:keep], values[:keep]


def _at_least(values_V: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values of all entries >= floor (-inf ones never), largest first, equal ones by id."""
    wanted = values_V >= floor if floor > -math.inf else values_V > -math.inf
    ids = wanted.nonzero()[:, 0]
    values, order = values_V[ids].sort(descending=True, stable=True)
    return ids[order], values


def _describe(logprobs_V: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    own = logprobs_V[token_id]
    rank = int(torch.count_nonzero(logprobs_V > own)) + 1
    best: list[tuple[int, float]] = []
    if top:
        count = min(top, len(logprobs_V))
        ids, values = _at_least(logprobs_V, float(logprobs_V.topk(count).values[-1]))
        best = list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return TokenLogprob(token_id, float(own), rank, best)
