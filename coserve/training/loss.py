"""The loss of a microbatch, a chunk of trained tokens at a time: no T x V logits, and dL/dx left behind.

loss = cross-entropy(head(norm(x)), target),   dx = norm'(dlogits W)
"""

from __future__ import annotations

from coserve.kernels.linear_cross_entropy import cross_entropy_
from coserve.kernels.soft_cap import soft_cap_
from coserve.models.decoder import Decoder
from coserve.training.microbatch import Microbatch

CHUNK = 256  # trained tokens of one loss unit: the head is read from memory once for them all


def loss_chunk(decoder: Decoder, microbatch: Microbatch, chunk: int, grad_scale: float) -> None:
    """Losses of the trained tokens [256 chunk, 256 (chunk + 1)) into `losses_T`, and the gradient w.r.t. the
    last layer's output, times `grad_scale`, into `dh_TH`, whose other rows the first chunk sets to zero."""
    saved = microbatch.saved
    if chunk == 0:
        saved.dh_TH.zero_()
    rows = microbatch.trained_rows[chunk * CHUNK : (chunk + 1) * CHUNK]
    x_CH = saved.x_out_TH[rows]
    logits_CV, cap, slope_CV = decoder.head.forward(decoder.final_norm(x_CH)), decoder.config.logit_cap, None
    if cap:  # z = cap tanh(u / cap), dz/du = 1 - (z / cap)^2
        slope_CV = 1 - (soft_cap_(logits_CV, cap) / cap).square_()
    microbatch.losses_T[rows] = cross_entropy_(logits_CV, microbatch.targets_T[rows], grad_scale)
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    dh_CH = decoder.head.backward_input(logits_CV)
    saved.dh_TH[rows] = decoder.final_norm_backward(dh_CH, x_CH)
