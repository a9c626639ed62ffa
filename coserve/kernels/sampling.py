"""From logits to tokens: penalties, the choice of a token, log-probabilities. A row depends on itself alone.

    x = (z - max z) / temperature,   p ~ exp(x)        temperature 0: the largest z

min_p keeps what is at least min_p times as likely as the best; top_k the k likeliest of these (0: all);
top_p, over what is left (renormalised), the fewest whose probabilities reach it (1: all; Holtzman et al.
2020). The draw is an inverse CDF of a given number: over what the filters keep, likeliest first; without
filters over the whole vocabulary in order of id. Of equal values the lowest id comes first, everywhere.

No vocabulary is sorted in C++: a pass over a row keeps the maxima of small groups of values, which lead to
the few candidates, and a radix select finds the cut and the token among these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_index,
    triton_or_reference,
    wide,
)

_CDF_BLOCK = 256
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BIAS_OF_BYTE = np.where(_BITS_OF_BYTE, np.float32(0), np.float32(-math.inf))  # what its eight tokens get
_FLOORS = (-4.0, -6.0, -8.0, -11.0, -14.0, -18.0)  # of scaled logits: how far down top_p looks, step by step


class Choices(NamedTuple):
    """How R tokens are chosen: all [R] on the CPU, `rows` (indices into the logits) and `top_k` int64, the
    others float64; `numbers` lie in [0, 1)."""

    rows_R: torch.Tensor
    temperature_R: torch.Tensor
    top_k_R: torch.Tensor
    top_p_R: torch.Tensor
    min_p_R: torch.Tensor
    numbers_R: torch.Tensor


class TokenLogprobs(NamedTuple):
    """Of R tokens: log-probability (fp32 [R]), rank (int64 [R], 1 = likeliest), and the ids (int64 [R, top];
    -1 where fewer have a probability) and log-probabilities (fp32 [R, top]) of the likeliest, best first."""

    logprobs_R: torch.Tensor
    ranks_R: torch.Tensor
    top_ids_RK: torch.Tensor
    top_logprobs_RK: torch.Tensor


def choose_tokens(logits_SV: torch.Tensor, choices: Choices) -> torch.Tensor:
    """int64 [R] on the CPU: a token for each of `choices.rows` of `logits` [S, V], fp32 or bf16."""
    native = native_for(logits_SV)
    if native is None:
        return triton_or_reference(logits_SV, _choose_tokens_reference)(logits_SV, choices)
    R = len(choices.rows_R)
    _check_rows(logits_SV, choices.rows_R)
    require_index(torch.int64, top_k=choices.top_k_R)
    require_index(
        torch.float64,
        temperature=choices.temperature_R,
        top_p=choices.top_p_R,
        min_p=choices.min_p_R,
        numbers=choices.numbers_R,
    )
    require({len(tensor) for tensor in choices} == {R}, f"settings are not those of {R} rows")
    ids_R = torch.empty(R, dtype=torch.int64)
    native.choose_tokens(
        DTYPE_CODES[logits_SV.dtype],
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        choices.rows_R.data_ptr(),
        R,
        logits_SV.shape[1],
        *(tensor.data_ptr() for tensor in choices[1:]),
        ids_R.data_ptr(),
    )
    return ids_R


def token_logprobs(
    logits_SV: torch.Tensor, rows_R: torch.Tensor, targets_R: torch.Tensor, top: int
) -> TokenLogprobs:
    """Log-probabilities of one target token (int64 [R]) in each of `rows` (int64 [R]) of `logits` [S, V]."""
    top = min(top, logits_SV.shape[1])
    native = native_for(logits_SV)
    if native is None:
        return triton_or_reference(logits_SV, _token_logprobs_reference)(logits_SV, rows_R, targets_R, top)
    R, V = len(rows_R), logits_SV.shape[1]
    _check_rows(logits_SV, rows_R)
    require_index(torch.int64, targets=targets_R)
    inside = R == 0 or (0 <= int(targets_R.min()) and int(targets_R.max()) < V)
    require(len(targets_R) == R and inside, f"expected {R} targets within the vocabulary of {V}")
    out = TokenLogprobs(
        torch.empty(R),
        torch.empty(R, dtype=torch.int64),
        torch.empty((R, top), dtype=torch.int64),
        torch.empty((R, top)),
    )
    native.token_logprobs(
        DTYPE_CODES[logits_SV.dtype],
        logits_SV.data_ptr(),
        logits_SV.stride(0),
        rows_R.data_ptr(),
        R,
        V,
        targets_R.data_ptr(),
        top,
        *(tensor.data_ptr() for tensor in out),
    )
    return out


def penalize_(
    logits_V: torch.Tensor,
    token_ids_T: torch.Tensor,
    num_prompt_tokens: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Penalties of the tokens so far (int64 [T] on the CPU, prompt first) on a row of fp32 logits, in place.

    Each token of prompt or output: z / repetition where z > 0, else z * repetition (Keskar et al. 2019). Then
    each token of the output: minus frequency times its count, minus presence (OpenAI's).
    """
    native = native_for(logits_V)
    if native is None or logits_V.dtype != torch.float32:
        how = (num_prompt_tokens, repetition, presence, frequency)
        return triton_or_reference(logits_V, _penalize_reference_)(logits_V, token_ids_T, *how)
    require(logits_V.is_contiguous(), "logits must be contiguous")
    require_index(torch.int64, token_ids=token_ids_T)
    T, V = len(token_ids_T), len(logits_V)
    require(0 <= num_prompt_tokens <= T, f"{num_prompt_tokens} prompt tokens of {T}")
    inside = T == 0 or (0 <= int(token_ids_T.min()) and int(token_ids_T.max()) < V)
    require(inside, f"a token lies outside the vocabulary of {V}")
    native.penalize(
        logits_V.data_ptr(), V, token_ids_T.data_ptr(), T, num_prompt_tokens, repetition, presence, frequency
    )


def keep_allowed_(logits_V: torch.Tensor, allowed_W: np.ndarray) -> None:
    """Minus infinity for the tokens of a row of fp32 logits whose bit isn't set in `allowed` (uint32 [W] on
    the CPU, 32 W >= V), in place. By a table of bytes: 37 us for 150,000 tokens, where `masked_fill_` takes
    530 on a CPU."""
    V = len(logits_V)
    require(32 * len(allowed_W) >= V, f"{len(allowed_W)} words are too few for {V} tokens")
    if logits_V.device.type != "cpu":
        return _keep_allowed_reference_(logits_V, allowed_W)
    bytes_B = allowed_W.view(np.uint8)
    bias_B8 = np.empty((len(bytes_B), 8), dtype=np.float32)
    np.take(_BIAS_OF_BYTE, bytes_B, axis=0, out=bias_B8, mode="clip")
    logits_V += torch.from_numpy(bias_B8.reshape(-1)[:V])


def _check_rows(logits: torch.Tensor, rows: torch.Tensor) -> None:
    S, V = logits.shape
    require(V == 1 or (V > 1 and logits.stride(1) == 1), f"rows of logits {(S, V)} must be contiguous")
    require_index(torch.int64, rows=rows)
    require(len(rows) == 0 or (0 <= int(rows.min()) and int(rows.max()) < S), f"a row lies outside of {S}")


# ---------------------------------------------------------------- the same in torch


def _choose_tokens_reference(logits: torch.Tensor, choices: Choices) -> torch.Tensor:
    chosen = []
    settings = zip(*(tensor.tolist() for tensor in choices), strict=True)
    for row, temperature, top_k, top_p, min_p, number in settings:
        z = wide(logits[row])
        if temperature == 0.0:
            chosen.append(int(z.argmax()))
            continue
        # The largest logit goes first, so that a tiny temperature can't overflow.
        scaled = (z - z.amax()) / temperature
        if top_k or top_p < 1.0 or min_p:
            ids, values = candidates(scaled, top_k, top_p, min_p)
            cdf_C = values.double().exp().cumsum(dim=-1)
            chosen.append(int(ids[_first_above(cdf_C, _target(cdf_C, number))]))
        else:
            chosen.append(_draw_open(scaled, number))
    return torch.tensor(chosen, dtype=torch.int64)


def _draw_open(scaled_V: torch.Tensor, number: float) -> int:
    """Two levels, blocks and then the block's tokens, since cumulating 150k numbers one by one takes 2 ms."""
    weights_V = scaled_V.exp()
    padding = -len(weights_V) % _CDF_BLOCK
    blocks_BC = torch.nn.functional.pad(weights_V, (0, padding)).view(-1, _CDF_BLOCK)
    ends_B = blocks_BC.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = _target(ends_B, number)
    block = _first_above(ends_B, target)
    inside_C = blocks_BC[block].double().cumsum(dim=-1)
    rest = target - float(ends_B[block - 1]) if block else target
    return block * _CDF_BLOCK + _first_above(inside_C, min(rest, _target(inside_C, 1.0)))


def _first_above(cdf_C: torch.Tensor, target: float) -> int:
    return int(torch.searchsorted(cdf_C, target, right=True))


def _target(cdf_C: torch.Tensor, number: float) -> float:
    """Where `number` points in an unnormalised fp64 CDF: always below its end, so that a first entry above
    exists, and has a probability."""
    total = float(cdf_C[-1])
    return min(number * total, math.nextafter(total, 0.0))


def candidates(
    scaled_V: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values of the tokens that the filters leave, most likely first, equal ones by id.

    `scaled` is fp32 [V] logits already divided by the temperature, the largest 0.
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


def _token_logprobs_reference(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, top: int
) -> TokenLogprobs:
    R = len(rows)
    all_RV = torch.log_softmax(wide(logits[rows.to(logits.device)]), dim=-1)
    own_R = all_RV.gather(1, targets.to(logits.device)[:, None])
    ranks_R = (all_RV > own_R).sum(dim=-1) + 1
    top_ids = torch.full((R, top), -1, dtype=torch.int64)
    top_logprobs = torch.full((R, top), -math.inf, dtype=all_RV.dtype)
    for row in range(R if top else 0):
        ids, values = _at_least(all_RV[row], float(all_RV[row].topk(top).values[-1]))
        ids, values = ids[:top], values[:top]
        top_ids[row, : len(ids)] = ids
        top_logprobs[row, : len(ids)] = values
    return TokenLogprobs(own_R[:, 0].cpu(), ranks_R.cpu(), top_ids, top_logprobs)


def _penalize_reference_(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    num_prompt_tokens: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    if repetition != 1.0:
        seen = token_ids.unique().to(logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if presence or frequency:
        ids, counts = token_ids[num_prompt_tokens:].unique(return_counts=True)
        logits[ids.to(logits.device)] -= (frequency * counts + presence).to(logits)


def _keep_allowed_reference_(logits: torch.Tensor, allowed: np.ndarray) -> None:
    words = torch.from_numpy(allowed.view(np.int32)).to(logits.device)
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    logits.masked_fill_(bits.view(-1)[: len(logits)] == 0, -math.inf)
