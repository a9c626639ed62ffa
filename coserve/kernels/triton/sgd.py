"""SGD in one pass over the flat buffers (formula in coserve/kernels/sgd.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from coserve.kernels.dispatch import require_flat
from coserve.kernels.triton.aot import AotCase
from coserve.kernels.triton.support import cdiv
from coserve.kernels.triton.tuning import Tuned


def _example(device: torch.device) -> Any:
    param, grad, buffer = (torch.rand(1 << 23, device=device) for _ in range(3))
    return lambda: sgd_(param, grad, buffer, 1e-3, 0.9, 0.0, 1.0)


CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps, "num_stages": 2}
    for block in (512, 1024, 2048)
    for warps in (2, 4, 8)
)
TUNED = Tuned("sgd", {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}, CANDIDATES, _example)


@triton.jit
def sgd_kernel(
    param, grad, momentum_buffer, count, lr, momentum, weight_decay, grad_scale,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of `count` fp32 elements, BLOCK a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.load(param + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale + weight_decay * p
    if MOMENTUM:
        g += momentum * tl.load(momentum_buffer + at, mask=inside, other=0.0)
        tl.store(momentum_buffer + at, g, mask=inside)
    tl.store(param + at, p - lr * g, mask=inside)


def sgd_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """Update flat fp32 `param` and `momentum_buffer` in place."""
    buffers = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    require_flat(param, grad=grad, **buffers)
    count, settings = param.numel(), TUNED.on(param.device)
    if count:
        sgd_kernel[(cdiv(count, settings["BLOCK"]),)](
            param, grad, momentum_buffer, count, lr, momentum, weight_decay, grad_scale,
            MOMENTUM=momentum_buffer is not None, **settings,
        )  # fmt: skip


_TYPES = dict.fromkeys(("param", "grad", "momentum_buffer"), "*fp32:16") | {"count": "i32"}
_TYPES |= dict.fromkeys(("lr", "momentum", "weight_decay", "grad_scale"), "fp32")
AOT_CASES = [AotCase(sgd_kernel, _TYPES, {"MOMENTUM": True}, TUNED)]
