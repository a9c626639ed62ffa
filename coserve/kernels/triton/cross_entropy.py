"""Scores of targets and the gradient of logits (formula in coserve/kernels/cross_entropy.py).

One program a row for the scores: an online softmax over blocks of the vocabulary, its sums lane by lane and
over the lanes in one tree, so a row depends on no other. The gradient is elementwise, in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.cross_entropy import TokenScores
from coserve.kernels.dispatch import require, require_index
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv, require_dense
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Any:
    logits = torch.randn(256, 151936, device=device, dtype=torch.bfloat16)
    targets = torch.zeros(256, device=device, dtype=torch.int64)
    ones = torch.ones(256, device=device)
    lse = torch.full_like(ones, 12.0)

    def run() -> None:
        token_scores(logits, targets)
        logit_gradient_(logits, targets, lse, ones, ones, 0.0)

    return run


CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps, "num_stages": 2}
    for block in (1024, 2048, 4096, 8192)
    for warps in (4, 8, 16)
)
TUNED = Tuned("cross_entropy", {"BLOCK": 4096, "num_warps": 8, "num_stages": 2}, CANDIDATES, _example)


@triton.jit
def scores_kernel(logits, targets, V, lse, logprob, mean_logprob, greedy, BLOCK: tl.constexpr):
    """fp32 lse, log-probability of the int64 target, mean log-probability and bool greedy of one row of
    logits [C, V]."""
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * V
    top, first = float("-inf"), 0
    sums, plain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        z = tl.load(z_row + v, mask=inside, other=float("-inf")).to(tl.float32)
        highest = tl.max(z, 0)
        at = tl.min(tl.where(inside & (z == highest), v, V), 0)
        first = tl.where(highest > top, at, first)
        higher = tl.maximum(top, highest)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(top - shift) + tl.exp(z - shift)
        plain += tl.where(inside, z, 0.0)
        top = higher
    total = top + tl.log(tl.sum(sums, 0))
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    own = tl.load(z_row + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(lse + row, total)
    tl.store(logprob + row, own - total)
    tl.store(mean_logprob + row, tl.sum(plain, 0) / V - total)
    tl.store(greedy + row, first == target)


@triton.jit
def gradient_kernel(
    logits, targets, V, lse, weight, uniform, soft_cap, CAPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A BLOCK of a row of logits [C, V] becomes its gradient, given fp32 lse, weight and uniform [C]; with
    CAPS also through soft_cap."""
    row = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    at = logits + row.to(tl.int64) * V + v
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse + row))
    onehot = tl.where(v == tl.load(targets + row), 1.0, 0.0)
    grad = tl.load(weight + row) * (p - onehot) + tl.load(uniform + row) * (p - 1.0 / V)
    if CAPS:
        bent = z / soft_cap
        grad = grad * (1.0 - bent * bent)
    tl.store(at, grad.to(logits.dtype.element_ty), mask=inside)


def token_scores(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> TokenScores:
    """Scores of int64 targets [C]; a target outside the vocabulary has the log-probability NaN."""
    C, V = logits_CV.shape
    device = logits_CV.device
    require_dense(logits=logits_CV)
    require_index(torch.int64, device, targets=targets_C)
    scores = TokenScores(
        *(torch.empty(C, device=device) for _ in range(3)), torch.empty(C, dtype=torch.bool, device=device)
    )
    if C:
        scores_kernel[(C,)](logits_CV, targets_C, V, *scores, **TUNED.on(device))
    return scores


def logit_gradient_(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    lse_C: torch.Tensor,
    weight_C: torch.Tensor,
    uniform_C: torch.Tensor,
    soft_cap: float,
) -> None:
    """`logits` become the gradient in place; the other floats are fp32 [C]."""
    C, V = logits_CV.shape
    require_dense(logits=logits_CV, lse=lse_C, weight=weight_C, uniform=uniform_C)
    require_index(torch.int64, logits_CV.device, targets=targets_C)
    floats = (lse_C, weight_C, uniform_C)
    fit = all(x.dtype == torch.float32 and x.device == logits_CV.device and len(x) == C for x in floats)
    require(fit and len(targets_C) == C, f"expected fp32 values for {C} rows of logits")
    if C:
        settings = TUNED.on(logits_CV.device)
        gradient_kernel[(C, cdiv(V, settings["BLOCK"]))](
            logits_CV, targets_C, V, *floats, soft_cap, CAPS=soft_cap != 0, **settings
        )


def _cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        common = {"logits": f"*{dtype}:16", "targets": "*i64", "V": "i32:16", "lse": "*fp32"}
        scores = common | {"logprob": "*fp32", "mean_logprob": "*fp32", "greedy": "*i1"}
        cases.append(AotCase(scores_kernel, scores, {}, TUNED))
        gradient = common | {"weight": "*fp32", "uniform": "*fp32", "soft_cap": "fp32"}
        cases.append(AotCase(gradient_kernel, gradient, {"CAPS": True}, TUNED))
    return cases


AOT_CASES = _cases()
