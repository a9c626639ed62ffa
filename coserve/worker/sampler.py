"""From logits to tokens. A row's result depends on nothing but the row: its logits, its settings, its tokens.

Order: raw log-probabilities are taken (what `logprobs` reports); then a grammar's mask, allowed ids, the bans
on ends of bad words and, before `min_tokens`, on end tokens, logit bias, penalties; then the choice
(kernels/sampling.py). The number drawn is a hash of (seed, position): preemption, batching and training
change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from coserve.core.sampling_params import SamplingParams
from coserve.kernels.sampling import (
    Choices,
    TokenLogprobs,
    choose_tokens,
    keep_allowed_,
    penalize_,
    token_logprobs,
)

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits and how to choose from it.

    `token_ids` is prompt and output so far, the first `num_prompt_tokens` of them the prompt; `stop_ids` are
    what `min_tokens` bans. `allowed` (uint32 [W], a bit a token, not all 0) is what a grammar allows: of
    `end_ids`, the model's end tokens, those where it is complete.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    stop_ids: frozenset[int] = frozenset()
    allowed: np.ndarray | None = None
    end_ids: frozenset[int] = frozenset()

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
    """Choose one token for each row of logits [S, V], fp32 or bf16. Rows with a bias, a ban or penalties are
    overwritten where the logits are fp32."""
    adjusted = [index for index, row in enumerate(rows) if _is_adjusted(row)]
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    overwritten = set(adjusted) if logits_SV.dtype == torch.float32 else set()
    copied = [index for index in wanted if index in overwritten]
    raw_CV = torch.stack([logits_SV[index] for index in copied]) if copied else logits_SV
    if adjusted:
        token_ids = _choose_adjusted(logits_SV, rows, adjusted)
    else:
        token_ids = _choose(logits_SV, rows, range(len(rows)))
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    untouched = [index for index in wanted if index not in overwritten]
    _report(logits_SV, untouched, untouched, rows, token_ids, logprobs)
    _report(raw_CV, range(len(copied)), copied, rows, token_ids, logprobs)
    return SampledTokens(token_ids, logprobs)


def _report(
    raw_SV: torch.Tensor,
    places: Sequence[int],
    indices: Sequence[int],
    rows: Sequence[SamplingRow],
    token_ids: Sequence[int],
    logprobs: list[TokenLogprob | None],
) -> None:
    """Fill in the log-probabilities of the rows of these `indices`, whose raw logits stand at `places`."""
    if not indices:
        return
    top = max(rows[index].params.logprobs or 0 for index in indices)
    targets = [token_ids[index] for index in indices]
    found = _listed(token_logprobs(raw_SV, _int64(places), _int64(targets), top), targets)
    for place, index, entry in zip(places, indices, found, strict=True):
        named, top = rows[index].params.logprob_token_ids, rows[index].params.logprobs or 0
        alternatives = _named(raw_SV[place], named) if named else entry.top[:top]
        logprobs[index] = entry._replace(top=alternatives)


def score(logits_SV: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens (a prompt's own), one for each row of logits [S, V], fp32 or bf16."""
    rows_S = torch.arange(len(targets))
    return _listed(token_logprobs(logits_SV, rows_S, _int64(targets), top), targets)


def _choose_adjusted(
    logits_SV: torch.Tensor, rows: Sequence[SamplingRow], adjusted: Sequence[int]
) -> list[int]:
    """The choice where some rows' logits change first: fp32 ones in place, others in a copy, for what is
    added would not survive their rounding."""
    if logits_SV.dtype == torch.float32:
        for index in adjusted:
            _adjust_(logits_SV[index], rows[index])
        return _choose(logits_SV, rows, range(len(rows)))
    wide_AV = torch.empty((len(adjusted), logits_SV.shape[1]), device=logits_SV.device)
    for logits_V, index in zip(wide_AV, adjusted, strict=True):
        logits_V.copy_(logits_SV[index])  # row by row: a gather of rows takes four times as long
        _adjust_(logits_V, rows[index])
    changed = set(adjusted)
    untouched = [index for index in range(len(rows)) if index not in changed]
    token_ids = [0] * len(rows)
    for index, token in zip(
        untouched, _choose(logits_SV, [rows[i] for i in untouched], untouched), strict=True
    ):
        token_ids[index] = token
    own = range(len(adjusted))
    for index, token in zip(adjusted, _choose(wide_AV, [rows[i] for i in adjusted], own), strict=True):
        token_ids[index] = token
    return token_ids


def _choose(logits_SV: torch.Tensor, rows: Sequence[SamplingRow], places: Sequence[int]) -> list[int]:
    """A token for each of `rows`, whose logits stand at `places`."""
    params = [row.params for row in rows]
    choices = Choices(
        _int64(places),
        _float64([p.temperature for p in params]),
        _int64([p.top_k for p in params]),
        _float64([p.top_p for p in params]),
        _float64([p.min_p for p in params]),
        _float64([0.0 if row.params.greedy else uniform(row.params.seed, row.position) for row in rows]),
    )
    return choose_tokens(logits_SV, choices).tolist()


def _named(logits_V: torch.Tensor, token_ids: Sequence[int]) -> list[tuple[int, float]]:
    """Log-probabilities of these ids, in their order."""
    wide_V = logits_V.float()
    values = wide_V[_ids(token_ids, wide_V)] - wide_V.logsumexp(dim=-1)
    return list(zip(token_ids, values.tolist(), strict=True))


def _listed(found: TokenLogprobs, targets: Sequence[int]) -> list[TokenLogprob]:
    columns = (tensor.tolist() for tensor in found)
    return [
        TokenLogprob(target, logprob, rank, [pair for pair in zip(ids, values, strict=True) if pair[0] >= 0])
        for target, logprob, rank, ids, values in zip(targets, *columns, strict=True)
    ]


def _int64(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _float64(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
        row.allowed is not None
        or params.allowed_token_ids
        or params.logit_bias
        or params.bad_words
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or row.num_output_tokens < params.min_tokens
    )


def _adjust_(logits_V: torch.Tensor, row: SamplingRow) -> None:
    params = row.params
    allowed_W = _allowed(row, len(logits_V))
    if allowed_W is not None:
        keep_allowed_(logits_V, allowed_W)
    elif banned := _bad_ends(row) | _early_ends(row):
        logits_V[_ids(banned, logits_V)] = -math.inf
    if params.logit_bias:
        bias = torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[_ids(params.logit_bias, logits_V)] += bias
    if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        penalize_(
            logits_V,
            _int64(row.token_ids),
            row.num_prompt_tokens,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )


def _allowed(row: SamplingRow, vocab: int) -> np.ndarray | None:
    """uint32 [W]: what a grammar, or else the request's allowed ids, leave, less its bans as far as that
    leaves something; None without either. With `ignore_eos` an output ends only where its grammar can't go
    on."""
    params, allowed_W = row.params, row.allowed
    bans = [_bad_ends(row), _early_ends(row)]
    if allowed_W is None:
        if not params.allowed_token_ids:
            return None
        allowed_W = ~_others(params.allowed_token_ids, -(-vocab // 32))
    elif params.ignore_eos:
        bans.append(row.end_ids)
    left = [_others(ids, len(allowed_W)) for ids in bans if ids]
    if row.allowed is not None and params.allowed_token_ids:
        left.append(~_others(params.allowed_token_ids, len(allowed_W)))
    for others_W in left:
        less_W = allowed_W & others_W
        allowed_W = less_W if less_W.any() else allowed_W
    return allowed_W


@lru_cache(maxsize=64)
def _others(ids: frozenset[int] | tuple[int, ...], words: int) -> np.ndarray:
    """uint32 [words]: a bit for each token but these."""
    listed = np.fromiter(ids, dtype=np.int64)
    listed = listed[listed < 32 * words]
    bits_W = np.zeros(words, dtype=np.uint32)
    np.bitwise_or.at(bits_W, listed >> 5, np.uint32(1) << (listed & 31).astype(np.uint32))
    return ~bits_W


def _early_ends(row: SamplingRow) -> frozenset[int]:
    """Tokens that would end the output before `min_tokens`."""
    return row.stop_ids if row.num_output_tokens < row.params.min_tokens else frozenset()


def _bad_ends(row: SamplingRow) -> frozenset[int]:
    """Tokens that would end a bad word which the output has begun."""
    ends = set()
    for word in row.params.bad_words:
        begun = len(word) - 1
        if begun > row.num_output_tokens or (begun and row.token_ids[-1] != word[-2]):
            continue
        if tuple(row.token_ids[row.position - begun :]) == word[:-1]:
            ends.add(word[-1])
    return frozenset(ends)


def _ids(
    ids: Sequence[int] | set[int] | frozenset[int] | dict[int, float], like: torch.Tensor
) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)
