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
_FLOORS = (-4.0, -8.0, -16.0, -math.inf)  # scaled logits below the best that top_p looks at, wider and wider


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
    wanting = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    raw = torch.log_softmax(logits_SV[wanting], dim=-1) if wanting else None
    for index, row in enumerate(rows):
        if _is_adjusted(row):
            _adjust_(logits_SV[index], row)
    token_ids = _choose(logits_SV, rows)
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    for at, index in enumerate(wanting):
        assert raw is not None
        logprobs[index] = _describe(raw[at], token_ids[index], rows[index].params.logprobs or 0)
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
    open_rows = []
    for index, row in enumerate(rows):
        if row.params.greedy:
            continue
        if row.params.top_k or row.params.top_p < 1.0 or row.params.min_p:
            chosen[index] = _draw_filtered(logits_SV[index], row)
        else:
            open_rows.append(index)
    if open_rows:
        drawn = _draw_open(logits_SV[open_rows], [rows[index] for index in open_rows])
        for index, token in zip(open_rows, drawn, strict=True):
            chosen[index] = token
    return chosen


def _draw_open(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Rows without filters: inverse CDF over the whole vocabulary, in order of id.

    Two levels, blocks and then the block's tokens, since cumulating 150k numbers one by one takes 2 ms a row.
    """
    temperatures = torch.tensor([row.params.temperature for row in rows], device=logits_SV.device)
    # The largest logit goes first, so that a tiny temperature can't overflow.
    weights_SV = ((logits_SV - logits_SV.amax(dim=-1, keepdim=True)) / temperatures[:, None]).exp()
    padding = -weights_SV.shape[1] % _CDF_BLOCK
    blocks_SBC = torch.nn.functional.pad(weights_SV, (0, padding)).view(len(rows), -1, _CDF_BLOCK)
    ends_SB = blocks_SBC.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    numbers = torch.tensor([uniform(row.params.seed, row.position) for row in rows], dtype=torch.float64)
    targets_S = _targets(ends_SB[:, -1], numbers.to(logits_SV.device))
    block_S = torch.searchsorted(ends_SB, targets_S[:, None], right=True)[:, 0]
    every = torch.arange(len(rows), device=logits_SV.device)
    inside_SC = blocks_SBC[every, block_S].double().cumsum(dim=-1)
    before_S = torch.where(block_S > 0, ends_SB[every, (block_S - 1).clamp(min=0)], 0.0)
    rest_S = torch.minimum(targets_S - before_S, _targets(inside_SC[:, -1], torch.ones_like(targets_S)))
    within_S = torch.searchsorted(inside_SC, rest_S[:, None], right=True)[:, 0]
    return (block_S * _CDF_BLOCK + within_S).tolist()


def _draw_filtered(logits_V: torch.Tensor, row: SamplingRow) -> int:
    scaled = (logits_V - logits_V.amax()) / row.params.temperature
    ids, values = candidates(scaled, row.params.top_k, row.params.top_p, row.params.min_p)
    cdf = values.double().exp().cumsum(dim=-1)
    number = torch.tensor([uniform(row.params.seed, row.position)], dtype=torch.float64, device=cdf.device)
    return int(ids[int(torch.searchsorted(cdf, _targets(cdf[-1:], number), right=True))])


def _targets(total_S: torch.Tensor, numbers_S: torch.Tensor) -> torch.Tensor:
    """Where the numbers point in unnormalised CDFs that end at `total`: always below it, so that the first
    entry above exists (and has a probability)."""
    return torch.minimum(numbers_S * total_S, torch.nextafter(total_S, torch.zeros_like(total_S)))


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
    total = scaled_V.exp().sum(dtype=torch.float64)
    for floor in _FLOORS:
        ids, values = _at_least(scaled_V, floor)
        if floor == -math.inf or float(values.double().exp().sum()) >= top_p * float(total):
            break
    return _nucleus(ids, values, total, top_p)


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
    rank = int((logprobs_V > own).sum()) + 1
    best: list[tuple[int, float]] = []
    if top:
        count = min(top, len(logprobs_V))
        ids, values = _at_least(logprobs_V, float(logprobs_V.topk(count).values[-1]))
        best = list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return TokenLogprob(token_id, float(own), rank, best)
