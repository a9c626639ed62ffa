"""Log-probabilities of target tokens, and the gradient of any loss that is a function of them.

    logp = z[target] - logsumexp(z)
    dz = weight (softmax(z) - onehot(target)) + uniform (softmax(z) - 1/V)

which is the gradient of  -weight logp - uniform mean_v log softmax(z)_v:  `weight` is -dL/dlogp, of either
sign, `uniform` the part of a smoothed label. The two halves stand apart so that a loss may look at the
log-probabilities of all its tokens before it decides on their weights (training/objectives.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
    wide,
)

IGNORED = -100


class TokenScores(NamedTuple):
    """Of each row of logits: logsumexp, log-probability of the target, mean log-probability of the whole
    vocabulary (fp32 [C]), and whether the target is the first of the largest logits (bool [C])."""

    lse_C: torch.Tensor
    logprob_C: torch.Tensor
    mean_logprob_C: torch.Tensor
    greedy_C: torch.Tensor


def token_scores(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> TokenScores:
    """Scores of `targets` int64 [C] under `logits` [C, V] (fp32 or bf16). ValueError for a target outside
    the vocabulary; on CUDA, where nobody waits for the answer, its log-probability is NaN instead."""
    C, V = logits_CV.shape
    require(len(targets_C) == C, f"{len(targets_C)} targets for {C} rows of logits")
    inside = C == 0 or not targets_C.is_cpu or (0 <= int(targets_C.min()) and int(targets_C.max()) < V)
    require(inside, f"a target lies outside the vocabulary of {V}")
    native = native_for(logits_CV)
    if native is None:
        return triton_or_reference(logits_CV, _token_scores_reference)(logits_CV, targets_C)
    require_like(logits_CV, contiguous=True, logits=logits_CV)
    require_index(torch.int64, targets=targets_C)
    scores = TokenScores(*(torch.empty(C) for _ in range(3)), torch.empty(C, dtype=torch.bool))
    native.token_scores(
        DTYPE_CODES[logits_CV.dtype],
        logits_CV.data_ptr(),
        targets_C.data_ptr(),
        C,
        V,
        *(tensor.data_ptr() for tensor in scores),
    )
    return scores


def logit_gradient_(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    lse_C: torch.Tensor,
    weight_C: torch.Tensor,
    uniform_C: torch.Tensor,
    soft_cap: float = 0.0,
) -> None:
    """`logits` become the loss's gradient in place; `weight`, `uniform` fp32 [C] as above.

    With `soft_cap` c > 0 the logits are c tanh(u / c), and the gradient is that w.r.t. u.
    """
    native = native_for(logits_CV)
    if native is None:
        run = triton_or_reference(logits_CV, _logit_gradient_reference_)
        run(logits_CV, targets_C, lse_C, weight_C, uniform_C, soft_cap)
        return
    C, V = logits_CV.shape
    require_like(logits_CV, contiguous=True, logits=logits_CV)
    require_like(lse_C, contiguous=True, weight=weight_C, uniform=uniform_C)
    require_index(torch.int64, targets=targets_C)
    lengths = {len(targets_C), len(lse_C), len(weight_C), len(uniform_C)}
    require(lengths == {C} and lse_C.dtype == torch.float32, f"expected fp32 values for {C} rows of logits")
    native.logit_gradient(
        DTYPE_CODES[logits_CV.dtype],
        logits_CV.data_ptr(),
        targets_C.data_ptr(),
        C,
        V,
        lse_C.data_ptr(),
        weight_C.data_ptr(),
        uniform_C.data_ptr(),
        soft_cap,
    )


def _token_scores_reference(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    z = wide(logits)
    lse = z.logsumexp(-1)
    logprob = z.gather(1, targets[:, None]).squeeze(1) - lse
    return TokenScores(lse, logprob, z.mean(-1) - lse, z.argmax(-1) == targets)


def _logit_gradient_reference_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    weight: torch.Tensor,
    uniform: torch.Tensor,
    soft_cap: float,
) -> None:
    z = wide(logits)
    grad = torch.exp(z - lse[:, None].to(z))
    grad.scatter_add_(1, targets[:, None], torch.full_like(grad[:, :1], -1.0))
    grad.mul_(weight[:, None])
    if bool(uniform.any()):
        grad.addcmul_(torch.exp(z - lse[:, None].to(z)) - 1.0 / z.shape[1], uniform[:, None].to(z))
    if soft_cap:
        grad.mul_(1.0 - (z / soft_cap).square())
    logits.copy_(grad)
