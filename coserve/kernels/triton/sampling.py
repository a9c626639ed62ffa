"""Choosing tokens on CUDA without sorting a vocabulary; formulas as in the CPU's file.

A token's *depth* is (largest logit - its logit) / temperature, its weight exp(-depth). Depths are positive:
their bits order them as integers. Every filter, and the draw, asks for the depth at which something summed
over the likelier tokens reaches a goal: top_k their number, top_p and the draw their weight. It is found by
bisecting the 31 bits; of equal depths the lower ids go first. Only candidates take part: a first look counts
the tokens above fixed depths (LEVELS) and min_p's, and the fewest that surely suffice are copied out. Without
filters the draw goes by id. A row's chunks are summed in a fixed order; rows are independent. The host waits
once, for the ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require
from coserve.kernels.sampling import Choices, TokenLogprobs
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv, next_power_of_2, require_dense
from coserve.kernels.triton.tuning import Tuned

LEVELS = tl.constexpr(16)  # depths that are counted: 1 to 14, min_p's, and all that is finite
DEEPEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest finite depth
NOWHERE = tl.constexpr(0x7FFFFFFF)
ROWS = 32  # drawn at a time: bounds the candidates' memory to 8 bytes a row and token

TUNED = Tuned("sampling_chunks", {"BLOCK": 2048, "num_warps": 8, "num_stages": 1})
TUNED_DRAW = Tuned("sampling_draw", {"BLOCK": 2048, "num_warps": 8, "num_stages": 1})
TUNED_LOGPROBS = Tuned("token_logprobs", {"BLOCK": 4096, "num_warps": 8, "num_stages": 1})
TUNED_PENALTIES = Tuned("penalties", {"BLOCK": 256, "num_warps": 4, "num_stages": 1})


@triton.jit
def _setting(settings, R, row, FIELD: tl.constexpr):
    """Of the fp64 settings [6, R]: row of the logits, temperature, top_k, top_p, min_p's depth, number."""
    return tl.load(settings + FIELD * R + row)


@triton.jit
def _filters(settings, R, row, V):
    """(temperature, top_k or 0 where it keeps all, top_p, min_p's depth, whether any of them filters)."""
    k = _setting(settings, R, row, 2)
    k = tl.where(k < V, k, 0.0).to(tl.int32)
    p, least = _setting(settings, R, row, 3), _setting(settings, R, row, 4).to(tl.float32)
    return (
        _setting(settings, R, row, 1).to(tl.float32),
        k,
        p,
        least,
        (k > 0) | (p < 1) | (least < float("inf")),
    )


@triton.jit(do_not_specialize=["R"])
def chunk_best_kernel(logits, stride, V, settings, R, chunks, best, best_at, BLOCK: tl.constexpr):
    """Grid (R, chunks): the largest logit of a chunk and the lowest id that has it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    id_B = chunk * BLOCK + tl.arange(0, BLOCK)
    start = _setting(settings, R, row, 0).to(tl.int64) * stride
    x_B = tl.load(logits + start + id_B, mask=id_B < V, other=float("-inf")).to(tl.float32)
    top = tl.max(x_B, 0)
    tl.store(best + row * chunks + chunk, top)
    tl.store(best_at + row * chunks + chunk, tl.min(tl.where((x_B == top) & (id_B < V), id_B, V - 1), 0))


@triton.jit
def _best(best, best_at, row, chunks, CHUNKS: tl.constexpr):
    """(largest logit, lowest id that has it) of a row."""
    chunk_C = tl.arange(0, CHUNKS)
    top_C = tl.load(best + row * chunks + chunk_C, mask=chunk_C < chunks, other=float("-inf"))
    at_C = tl.load(best_at + row * chunks + chunk_C, mask=chunk_C < chunks, other=NOWHERE)
    top = tl.max(top_C, 0)
    return top, tl.min(tl.where(top_C == top, at_C, NOWHERE), 0)


@triton.jit
def _depths(logits, id_B, V, top, temperature):
    x_B = tl.load(logits + id_B, mask=id_B < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(top - x_B, tl.zeros_like(x_B) + temperature)


@triton.jit
def _level_depths(least):
    """[LEVELS]: the depths that are counted."""
    level_L = tl.arange(0, LEVELS)
    deepest_L = (level_L * 0 + DEEPEST).to(tl.float32, bitcast=True)
    depth_L = tl.where(level_L == LEVELS - 2, tl.minimum(deepest_L, least), level_L + 1.0)
    return tl.where(level_L == LEVELS - 1, deepest_L, depth_L)


@triton.jit(do_not_specialize=["R"])
def chunk_weights_kernel(
    logits, stride, V, settings, R, chunks, best, best_at, counts, weights,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, chunks): number and weight of a chunk's tokens down to each level."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, _, _, least, _ = _filters(settings, R, row, V)
    if temperature == 0:
        return
    top, _ = _best(best, best_at, row, chunks, CHUNKS)
    start = _setting(settings, R, row, 0).to(tl.int64) * stride
    depth_B = _depths(logits + start, chunk * BLOCK + tl.arange(0, BLOCK), V, top, temperature)
    inside_BL = depth_B[:, None] <= _level_depths(least)[None, :]
    out_L = (row * chunks + chunk) * LEVELS + tl.arange(0, LEVELS)
    tl.store(counts + out_L, tl.sum(inside_BL.to(tl.int32), 0))
    tl.store(weights + out_L, tl.sum(tl.where(inside_BL, tl.exp(-depth_B)[:, None], 0.0), 0))


@triton.jit
def _level(counts, weights, row, chunks, k, p, least, CHUNKS: tl.constexpr):
    """(level whose tokens hold all that the filters may keep, their number, weight of all tokens)."""
    chunk_C, level_L = tl.arange(0, CHUNKS), tl.arange(0, LEVELS)
    at_CL = (row * chunks + chunk_C)[:, None] * LEVELS + level_L[None, :]
    mask_CL = (chunk_C < chunks)[:, None]
    count_L = tl.sum(tl.load(counts + at_CL, mask=mask_CL, other=0), 0)
    weight_L = tl.sum(tl.load(weights + at_CL, mask=mask_CL, other=0.0).to(tl.float64), 0)
    total = tl.sum(tl.where(level_L == LEVELS - 1, weight_L, 0.0), 0)
    has_least = (least < float("inf")).to(tl.int32)
    by_weight_L = (weight_L >= p * total * 1.00001) & (k == 0) & (has_least == 0)
    reached_L = (((k > 0) & (count_L >= k)) | by_weight_L) & (level_L < LEVELS - 2)
    reached_L = reached_L | (level_L == LEVELS - 1) | ((level_L == LEVELS - 2) & (has_least > 0))
    n = tl.min(tl.where(reached_L, count_L, NOWHERE), 0)
    return tl.min(tl.where(reached_L & (count_L == n), level_L, LEVELS - 1), 0), n, total


@triton.jit(do_not_specialize=["R"])
def candidates_kernel(
    logits, stride, V, settings, R, chunks, best, best_at, counts, weights, keys, ids,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, chunks): copies the candidates' depths (as bits) and ids to the row's list, in order of id."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, k, p, least, filters = _filters(settings, R, row, V)
    if (temperature == 0) | (filters == 0):
        return
    level, _, _ = _level(counts, weights, row, chunks, k, p, least, CHUNKS)
    limit = tl.sum(tl.where(tl.arange(0, LEVELS) == level, _level_depths(least), 0.0), 0)
    chunk_C = tl.arange(0, CHUNKS)
    before_C = tl.load(counts + (row * chunks + chunk_C) * LEVELS + level, mask=chunk_C < chunk, other=0)
    top, _ = _best(best, best_at, row, chunks, CHUNKS)
    id_B = chunk * BLOCK + tl.arange(0, BLOCK)
    start = _setting(settings, R, row, 0).to(tl.int64) * stride
    depth_B = _depths(logits + start, id_B, V, top, temperature)
    inside_B = depth_B <= limit
    at_B = row * V + tl.sum(before_C, 0) + tl.cumsum(inside_B.to(tl.int32), 0) - 1
    tl.store(keys + at_B, depth_B.to(tl.int32, bitcast=True), mask=inside_B)
    tl.store(ids + at_B, id_B, mask=inside_B)


@triton.jit
def _down_to(keys, n, pivot, BLOCK: tl.constexpr):
    """(number, weight) of the candidates whose key is at most `pivot`."""
    count, weight = tl.cast(0, tl.int32), tl.cast(0.0, tl.float64)
    for start in range(0, n, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        key_B = tl.load(keys + at_B, mask=at_B < n, other=NOWHERE)
        inside_B = key_B <= pivot
        count += tl.sum(inside_B.to(tl.int32), 0)
        weight_B = tl.where(inside_B, tl.exp(-key_B.to(tl.float32, bitcast=True)), 0.0)
        weight += tl.sum(weight_B, 0).to(tl.float64)
    return count, weight


@triton.jit
def _search(keys, n, high, goal, BY_NUMBER: tl.constexpr, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key, at most `high`, down to which number or weight reach the goal (BEYOND: pass it); then
    (it, number of candidates before it, their weight, number of candidates at it, the weight of each)."""
    low = tl.cast(0, tl.int32)
    for _step in range(31):
        middle = low + (high - low) // 2
        count, weight = _down_to(keys, n, middle, BLOCK)
        if BY_NUMBER:
            reached = count >= goal
        elif BEYOND:
            reached = weight > goal
        else:
            reached = weight >= goal
        low = tl.where(reached, low, tl.minimum(middle + 1, high))
        high = tl.where(reached, middle, high)
    before, weight_before = _down_to(keys, n, high - 1, BLOCK)
    count, _ = _down_to(keys, n, high, BLOCK)
    each = tl.exp(-high.to(tl.float32, bitcast=True)).to(tl.float64)
    return high, before, weight_before, count - before, each


@triton.jit
def _draw_filtered(keys, ids, n, k, p, total, limited, number, BLOCK: tl.constexpr):
    """Id of the token drawn among candidates: top_k, top_p, then inverse CDF, the likeliest first."""
    # Kept are the keys below `cut` and the first `ties` of those at it.
    cut, ties = tl.cast(DEEPEST, tl.int32), tl.cast(0, tl.int32)
    _, kept = _down_to(keys, n, cut, BLOCK)
    if (k > 0) & (k < n):
        cut, before, weight, _, each = _search(keys, n, cut, k, True, False, BLOCK)
        ties = k - before
        kept = weight + ties.to(tl.float64) * each
    if p < 1:
        goal = p * tl.where(limited, kept, total)
        nucleus, before, weight, most, each = _search(keys, n, cut, goal, False, False, BLOCK)
        most = tl.where((nucleus == cut) & (ties > 0), ties, most)
        # A goal of weight nothing keeps one token; a weight may have vanished where the search has not.
        wanted = tl.ceil((goal - weight) / tl.maximum(each, 1e-45))
        ties = tl.minimum(tl.maximum(wanted, 1.0), tl.maximum(most, 1).to(tl.float64)).to(tl.int32)
        cut, kept = nucleus, weight + ties.to(tl.float64) * each
    goal = tl.minimum(number * kept, kept * (1 - 1e-15))
    drawn, before, weight, most, each = _search(keys, n, cut, goal, False, True, BLOCK)
    most = tl.where((drawn == cut) & (ties > 0), ties, most)
    tie = tl.minimum((goal - weight) / tl.maximum(each, 1e-45), most - 1.0).to(tl.int32)
    tie = tl.maximum(tie, 0)
    found, passed = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for start in range(0, n, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        same_B = tl.load(keys + at_B, mask=at_B < n, other=NOWHERE) == drawn
        id_B = tl.load(ids + at_B, mask=at_B < n, other=0)
        hit_B = same_B & (passed + tl.cumsum(same_B.to(tl.int32), 0) - 1 == tie)
        found += tl.sum(tl.where(hit_B, id_B, 0), 0)
        passed += tl.sum(same_B.to(tl.int32), 0)
    return found


@triton.jit
def _first_above(weight_X, index_X, goal):
    """(index of the first weight whose running sum passes the goal, what the sum was before it)."""
    likely_X = weight_X > 0
    above_X = likely_X & (tl.cumsum(weight_X, 0) > goal)
    last = tl.max(tl.where(likely_X, index_X, 0), 0)
    first = tl.minimum(tl.min(tl.where(above_X, index_X, NOWHERE), 0), last)
    return first, tl.sum(tl.where(index_X < first, weight_X, 0.0), 0)


@triton.jit
def _draw_open(
    logits, row, V, chunks, weights, top, temperature, total, number, CHUNKS: tl.constexpr, STEP: tl.constexpr
):
    """Id of the token drawn among all, by inverse CDF in order of id. Chunks of STEP tokens were weighed."""
    goal = tl.minimum(number * total, total * (1 - 1e-15))
    chunk_C = tl.arange(0, CHUNKS)
    at_C = (row * chunks + chunk_C) * LEVELS + LEVELS - 1
    weight_C = tl.load(weights + at_C, mask=chunk_C < chunks, other=0.0).to(tl.float64)
    chunk, passed = _first_above(weight_C, chunk_C, goal)
    id_B = chunk * STEP + tl.arange(0, STEP)
    weight_B = tl.exp(-_depths(logits, id_B, V, top, temperature)).to(tl.float64)
    token, _ = _first_above(weight_B, id_B, goal - passed)
    return token


@triton.jit(do_not_specialize=["R"])
def draw_kernel(
    logits, stride, V, settings, R, chunks, best, best_at, counts, weights, keys, ids, out,
    CHUNKS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R,): the row's token."""
    row = tl.program_id(0).to(tl.int64)
    temperature, k, p, least, filters = _filters(settings, R, row, V)
    number = _setting(settings, R, row, 5)
    top, token = _best(best, best_at, row, chunks, CHUNKS)
    if temperature > 0:
        _, n, total = _level(counts, weights, row, chunks, k, p, least, CHUNKS)
        if filters:
            limited, mine = (k > 0) | (least < float("inf")), row * V
            token = _draw_filtered(keys + mine, ids + mine, n, k, p, total, limited, number, BLOCK)
        else:
            start = _setting(settings, R, row, 0).to(tl.int64) * stride
            token = _draw_open(
                logits + start, row, V, chunks, weights, top, temperature, total, number, CHUNKS, STEP
            )
    tl.store(out + row, token.to(tl.int64))


def choose_tokens(logits_SV: torch.Tensor, choices: Choices) -> torch.Tensor:
    """int64 [R] on the CPU: a token for each of `choices.rows` of `logits`. `choices` are on the CPU."""
    V, device, R = logits_SV.shape[1], logits_SV.device, len(choices.rows_R)
    _check(logits_SV)
    depths_R = -choices.min_p_R.log()
    columns = (choices.rows_R, choices.temperature_R, choices.top_k_R, choices.top_p_R, depths_R)
    settings_6R = torch.stack([column.double() for column in (*columns, choices.numbers_R)])
    draws = bool((choices.temperature_R > 0).any())  # of a tensor on the CPU: nobody waits
    parts = [
        _choose(logits_SV, settings_6R[:, start : start + ROWS].to(device, non_blocking=True), draws)
        for start in range(0, R if V else 0, ROWS)
    ]
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.int64)


def _choose(logits_SV: torch.Tensor, settings_6R: torch.Tensor, draws: bool) -> torch.Tensor:
    V, device, R = logits_SV.shape[1], logits_SV.device, settings_6R.shape[1]
    settings_6R = settings_6R.contiguous()
    how, how_draw = TUNED.on(device), TUNED_DRAW.on(device)
    chunks = cdiv(V, how["BLOCK"])
    padded = next_power_of_2(chunks)
    best = torch.empty((R, chunks), dtype=torch.float32, device=device)
    best_at = torch.empty((R, chunks), dtype=torch.int32, device=device)
    levels = LEVELS.value if draws else 0
    counts = torch.empty((R, chunks, levels), dtype=torch.int32, device=device)
    weights = torch.empty((R, chunks, levels), dtype=torch.float32, device=device)
    keys, ids = torch.empty((2, R, V if draws else 0), dtype=torch.int32, device=device)
    out_R = torch.empty(R, dtype=torch.int64, device=device)
    args = logits_SV, logits_SV.stride(0), V, settings_6R, R, chunks, best, best_at
    grid = (R, chunks)
    chunk_best_kernel[grid](*args, **how)
    if draws:
        chunk_weights_kernel[grid](*args, counts, weights, CHUNKS=padded, **how)
        candidates_kernel[grid](*args, counts, weights, keys, ids, CHUNKS=padded, **how)
    draw_kernel[(R,)](*args, counts, weights, keys, ids, out_R, CHUNKS=padded, STEP=how["BLOCK"], **how_draw)
    return out_R


def _check(logits: torch.Tensor) -> None:
    require(logits.shape[1] < 2 or logits.stride(1) == 1, "logits must be contiguous in their rows")


@triton.jit(do_not_specialize=["top"])
def token_logprobs_kernel(
    logits, stride, V, rows, targets, top, logprobs, ranks, top_ids, top_logprobs, BLOCK: tl.constexpr
):
    """Grid (R,). The likeliest tokens are found one after the other, each by a look at all that follow it."""
    out = tl.program_id(0).to(tl.int64)
    x = logits + tl.load(rows + out) * stride
    own = tl.load(x + tl.load(targets + out)).to(tl.float32)
    best_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    rank = tl.cast(1, tl.int32)
    for start in range(0, V, BLOCK):
        id_B = start + tl.arange(0, BLOCK)
        x_B = tl.load(x + id_B, mask=id_B < V, other=float("-inf")).to(tl.float32)
        best_B = tl.maximum(best_B, x_B)
        rank += tl.sum((x_B > own).to(tl.int32), 0)
    best = tl.max(best_B, 0)
    total = tl.cast(0.0, tl.float64)
    for start in range(0, V, BLOCK):
        id_B = start + tl.arange(0, BLOCK)
        x_B = tl.load(x + id_B, mask=id_B < V, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp(x_B - best), 0).to(tl.float64)
    log_total = tl.log(total.to(tl.float32))
    tl.store(logprobs + out, own - best - log_total)
    tl.store(ranks + out, rank.to(tl.int64))
    last, last_id = tl.cast(float("inf"), tl.float32), tl.cast(-1, tl.int32)
    for place in range(0, top):
        value_B = tl.full((BLOCK,), float("-inf"), tl.float32)
        at_B = tl.full((BLOCK,), NOWHERE, tl.int32)
        for start in range(0, V, BLOCK):
            id_B = start + tl.arange(0, BLOCK)
            x_B = tl.load(x + id_B, mask=id_B < V, other=float("-inf")).to(tl.float32)
            follows_B = (x_B < last) | ((x_B == last) & (id_B > last_id))
            better_B = follows_B & (x_B > value_B)
            at_B = tl.where(better_B, id_B, at_B)
            value_B = tl.where(better_B, x_B, value_B)
        last = tl.max(value_B, 0)
        last_id = tl.min(tl.where(value_B == last, at_B, NOWHERE), 0)
        exists = last > float("-inf")
        tl.store(top_ids + out * top + place, tl.where(exists, last_id, -1).to(tl.int64))
        tl.store(top_logprobs + out * top + place, last - best - log_total)


def token_logprobs(
    logits_SV: torch.Tensor, rows_R: torch.Tensor, targets_R: torch.Tensor, top: int
) -> TokenLogprobs:
    """On the CPU: what `targets` have in `rows` of `logits`; rows and targets are int64 on the CPU."""
    V, device, R = logits_SV.shape[1], logits_SV.device, len(rows_R)
    _check(logits_SV)
    require(len(targets_R) == R, f"expected {R} targets")
    logprobs_R = torch.empty(R, dtype=torch.float32, device=device)
    ranks_R = torch.empty(R, dtype=torch.int64, device=device)
    top_ids = torch.empty((R, top), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((R, top), dtype=torch.float32, device=device)
    if R:
        rows, targets = torch.stack([rows_R, targets_R]).to(device, non_blocking=True)
        token_logprobs_kernel[(R,)](
            logits_SV, logits_SV.stride(0), V, rows, targets, top, logprobs_R, ranks_R, top_ids, top_logprobs,
            **TUNED_LOGPROBS.on(device),
        )  # fmt: skip
    return TokenLogprobs(logprobs_R.cpu(), ranks_R.cpu(), top_ids.cpu(), top_logprobs.cpu())


@triton.jit(do_not_specialize=["U"])
def penalties_kernel(logits, ids, counts, U, repetition, presence, frequency, BLOCK: tl.constexpr):
    """Grid (blocks of distinct tokens,): counts are those in the output."""
    at_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id_B = tl.load(ids + at_B, mask=at_B < U, other=0)
    count_B = tl.load(counts + at_B, mask=at_B < U, other=0).to(tl.float32)
    z_B = tl.load(logits + id_B, mask=at_B < U, other=0.0)
    divided_B = tl.div_rn(z_B, tl.zeros_like(z_B) + repetition)
    z_B = tl.where(z_B > 0, divided_B, z_B * repetition)
    z_B = tl.where(count_B > 0, z_B - (frequency * count_B + presence), z_B)
    tl.store(logits + id_B, z_B, mask=at_B < U)


def penalize_(
    logits_V: torch.Tensor,
    token_ids_T: torch.Tensor,
    num_prompt_tokens: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Penalties of the tokens so far (int64 [T] on the CPU) on one row of fp32 logits, in place."""
    require(logits_V.dtype == torch.float32, f"logits are {logits_V.dtype}, expected fp32")
    require_dense(logits=logits_V)
    ids_U, place_T = token_ids_T.unique(return_inverse=True)
    U = len(ids_U)
    if U == 0:
        return
    counts_U = place_T[num_prompt_tokens:].bincount(minlength=U)
    ids, counts = torch.stack([ids_U, counts_U]).to(logits_V.device, non_blocking=True)
    how = TUNED_PENALTIES.on(logits_V.device)
    grid = (cdiv(U, how["BLOCK"]),)
    penalties_kernel[grid](logits_V, ids, counts, U, repetition, presence, frequency, **how)


def _cases() -> list[AotCase]:
    index = {"V": "i32", "R": "i32", "chunks": "i32", "stride": "i32"}
    kinds = dict.fromkeys(("best", "weights", "logprobs", "top_logprobs"), "*fp32:16")
    kinds |= dict.fromkeys(("best_at", "counts", "keys", "ids"), "*i32:16")
    kinds |= dict.fromkeys(("out", "rows", "targets", "ranks", "top_ids"), "*i64:16")
    kinds |= index | {"settings": "*fp64:16", "top": "i32"}
    cases = []
    for dtype in ("fp32", "bf16"):
        for kernel, tuned, shape in (
            (chunk_best_kernel, TUNED, {}),
            (chunk_weights_kernel, TUNED, {"CHUNKS": 128}),
            (candidates_kernel, TUNED, {"CHUNKS": 128}),
            (draw_kernel, TUNED_DRAW, {"CHUNKS": 128, "STEP": TUNED.default["BLOCK"]}),
            (token_logprobs_kernel, TUNED_LOGPROBS, {}),
        ):
            signature = {name: kinds[name] for name in kernel.arg_names if name in kinds}
            cases.append(AotCase(kernel, signature | {"logits": f"*{dtype}"}, shape, tuned))
    scalars = dict.fromkeys(("repetition", "presence", "frequency"), "fp32")
    counted = {"logits": "*fp32:16", "ids": "*i64:16", "counts": "*i64:16", "U": "i32"}
    return [*cases, AotCase(penalties_kernel, counted | scalars, {}, TUNED_PENALTIES)]


AOT_CASES = _cases()
