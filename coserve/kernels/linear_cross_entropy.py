"""The head's linear and the cross-entropy, in chunks that never hold the T x V logits.

    loss = logsumexp(z) - z[target],   dz = (softmax(z) - onehot(target)) * grad_scale,   dh = dz W

Rows whose target is negative (IGNORED) have loss 0 and gradient 0 and do not go through the head.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import DTYPE_CODES, native_for, require, require_index, require_like, wide
from coserve.kernels.linear import PackedLinear

IGNORED = -100


def cross_entropy_(logits_CV: torch.Tensor, targets_C: torch.Tensor, grad_scale: float) -> torch.Tensor:
    """Losses [C] fp32; `logits` [C, V] (fp32 or bf16) become their gradient times `grad_scale` in place."""
    native = native_for(logits_CV)
    if native is None:
        return _cross_entropy_reference_(logits_CV, targets_C, grad_scale)
    C, V = logits_CV.shape
    require_like(logits_CV, contiguous=True, logits=logits_CV)
    require_index(torch.int64, targets=targets_C)
    require(len(targets_C) == C, f"{len(targets_C)} targets for {C} rows of logits")
    require(C == 0 or int(targets_C.max()) < V, f"a target lies outside the vocabulary of {V}")
    losses_C = torch.empty(C, dtype=torch.float32)
    native.cross_entropy(
        DTYPE_CODES[logits_CV.dtype],
        logits_CV.data_ptr(),
        targets_C.data_ptr(),
        C,
        V,
        grad_scale,
        losses_C.data_ptr(),
    )
    return losses_C


def linear_cross_entropy(
    h_TH: torch.Tensor, head: PackedLinear, targets_T: torch.Tensor, grad_scale: float, chunk: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(losses [T] fp32, dh [T, H])` of hidden states `h` [T, H] against `targets` [T] int64.

    `grad_scale` is dL/dloss, usually 1 / (trained tokens of the optimizer step). At most `chunk` rows of
    logits exist at a time.
    """
    losses_T = torch.zeros(len(h_TH), dtype=wide(h_TH[:0]).dtype, device=h_TH.device)
    dh_TH = torch.zeros_like(h_TH)
    for rows in (targets_T >= 0).nonzero().flatten().split(chunk):
        logits = head.forward(h_TH[rows])
        losses_T[rows] = cross_entropy_(logits, targets_T[rows], grad_scale)
        dh_TH[rows] = head.backward_input(logits)
    return losses_T, dh_TH


def _cross_entropy_reference_(logits: torch.Tensor, targets: torch.Tensor, grad_scale: float) -> torch.Tensor:
    z = wide(logits)
    kept = targets >= 0
    index = targets.clamp(min=0)[:, None]
    lse = z.logsumexp(-1, keepdim=True)
    losses = torch.where(kept, (lse - z.gather(1, index)).squeeze(1), 0.0)
    grad = torch.exp(z - lse)
    grad.scatter_add_(1, index, torch.full_like(lse, -1.0))
    logits.copy_(grad * (kept * grad_scale)[:, None])
    return losses
