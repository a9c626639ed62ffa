"""SGD with momentum on flat fp32 buffers, torch.optim.SGD's formula without dampening or Nesterov.

g = grad * grad_scale + weight_decay * p
buf = momentum * buf + g
p -= lr * buf                 (momentum 0: p -= lr * g, no buffer)

Three passes bound by memory, so torch's own operations are as good as a loop of ours.
"""

from __future__ import annotations

import torch


def sgd_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """Update flat fp32 `param` and `momentum_buffer` (zeros before the first step) in place; `grad` is kept.

    `grad_scale` multiplies the gradient first (clipping).
    """
    g = grad * grad_scale
    if weight_decay:
        g.add_(param, alpha=weight_decay)
    if momentum_buffer is not None:
        g = momentum_buffer.mul_(momentum).add_(g)
    param.add_(g, alpha=-lr)
