"""SGD with momentum on flat fp32 buffers, torch.optim.SGD's formula without dampening or Nesterov.

g = grad * grad_scale + weight_decay * p
buf = momentum * buf + g
p -= lr * buf                 (momentum 0: p -= lr * g, no buffer)

One pass over memory.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import native_for, require_flat, triton_or_reference


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
    native = native_for(param)
    if native is not None:
        buffers = {"grad": grad} if momentum_buffer is None else {"grad": grad, "buffer": momentum_buffer}
        require_flat(param, **buffers)
        buffer = 0 if momentum_buffer is None else momentum_buffer.data_ptr()
        numbers = param.numel(), lr, momentum, weight_decay, grad_scale
        native.sgd(param.data_ptr(), grad.data_ptr(), buffer, *numbers)
        return
    run = triton_or_reference(param, _sgd_reference_)
    run(param, grad, momentum_buffer, lr, momentum, weight_decay, grad_scale)


def _sgd_reference_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    g = grad * grad_scale
    if weight_decay:
        g.add_(param, alpha=weight_decay)
    if momentum_buffer is not None:
        g = momentum_buffer.mul_(momentum).add_(g)
    param.add_(g, alpha=-lr)
