"""A norm or gated activation with the first half of the LoRA of the linears that read it.

    y = norm(x) or act(gate) * up,   h_m = y a_m^T  for every module m that reads y

On CUDA one launch makes both, and `lora_expand_` adds h b. The C++ makes no h: its `lora_forward_` has both
halves in one call. Neither does CUDA's norm with `--deterministic`: the fused launch adds a row's squares in
another order than rms_norm.py, and the last bit of a row would tell whether some other row has an adapter.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import batch_invariant, native_for, triton_or_reference, wide
from coserve.kernels.dropout import Dropout
from coserve.kernels.lora import LoraGroup, LoraSegments, ProductLora, shrink_reference
from coserve.kernels.rms_norm import _rms_norm_reference, add_rms_norm, rms_norm
from coserve.kernels.swiglu import Activation, _swiglu_reference, swiglu


def rms_norm_shrink(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor | None,
    w_H: torch.Tensor,
    eps: float,
    lora: ProductLora | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(norm(s), s, h) of s = x + residual, or x, [T, H]. h, fp32 [modules, parts, T, R], is for
    `lora_expand_`; None where `lora_forward_` makes its own."""
    if lora is not None and native_for(x_TH) is None and not batch_invariant():
        return triton_or_reference(x_TH, _rms_norm_shrink_reference)(x_TH, residual_TH, w_H, eps, *lora)
    if residual_TH is None:
        return rms_norm(x_TH, w_H, eps), x_TH, None
    return *add_rms_norm(x_TH, residual_TH, w_H, eps), None


def swiglu_shrink(
    gate_up_T2I: torch.Tensor, act: Activation, lora: ProductLora | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, h) of y = act(gate) * up [T, I]; h as above."""
    if lora is None or native_for(gate_up_T2I) is not None:
        return swiglu(gate_up_T2I, act), None
    return triton_or_reference(gate_up_T2I, _swiglu_shrink_reference)(gate_up_T2I, act, *lora)


def _rms_norm_shrink_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor,
    eps: float,
    group: LoraGroup,
    segments: LoraSegments,
    ranks: torch.Tensor,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    y = _rms_norm_reference(total, w, eps)
    return y, total, _shrinks(y, group, segments, ranks, dropout)


def _swiglu_shrink_reference(
    gate_up: torch.Tensor,
    act: Activation,
    group: LoraGroup,
    segments: LoraSegments,
    ranks: torch.Tensor,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _swiglu_reference(gate_up, act)
    return y, _shrinks(y, group, segments, ranks, dropout)


def _shrinks(
    y: torch.Tensor, group: LoraGroup, segments: LoraSegments, ranks: torch.Tensor, dropout: Dropout | None
) -> torch.Tensor:
    width = int(ranks.max())
    h = wide(y).new_zeros(len(group.modules), 1, len(y), width)
    for m, module in enumerate(group.modules):
        own = dropout and dropout.salted(module.salt)
        made = shrink_reference(y, module.a_RK, segments, ranks[module.line], own)
        h[m, 0, :, : made.shape[1]] = made
    return h
