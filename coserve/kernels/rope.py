"""Rotary position embedding in place, half-split ("neox") style (Su et al. 2021).

    x1' = x1 cos(p) - x2 sin(p),   x2' = x2 cos(p) + x1 sin(p)

x1, x2 are the halves of the first 2 * cos.shape[1] features of a head; further features stay. The inverse
turns by -p, which is also the gradient.
"""

from __future__ import annotations

import torch

from coserve.kernels.dispatch import (
    DTYPE_CODES,
    is_index,
    native_for,
    require,
    require_index,
    require_like,
    triton_or_reference,
    wide,
)


def apply_rope_(
    x_TND: torch.Tensor,
    positions_T: torch.Tensor,
    cos_PD2: torch.Tensor,
    sin_PD2: torch.Tensor,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate `x` [T, N, D] (fp32 or bf16; token stride free, [N, D] contiguous) in place and return it.

    `positions` [T] int64 index the fp32 tables `cos`, `sin` [P, D/2].
    """
    native = native_for(x_TND)
    if native is None:
        return triton_or_reference(x_TND, _apply_rope_reference_)(
            x_TND, positions_T, cos_PD2, sin_PD2, inverse
        )
    T, N, D = x_TND.shape
    half = cos_PD2.shape[1]
    if not (
        x_TND.stride()[1:] == (D, 1)
        and is_index(positions_T, torch.int64)
        and cos_PD2.dtype is torch.float32
        and sin_PD2.dtype is torch.float32
        and cos_PD2.is_contiguous()
        and sin_PD2.is_contiguous()
        and 2 * half <= D
        and positions_T.numel() == T
    ):
        _check(x_TND, positions_T, cos_PD2, sin_PD2)
    native.rope(
        DTYPE_CODES[x_TND.dtype],
        x_TND.data_ptr(),
        x_TND.stride(0),
        T,
        N,
        D,
        positions_T.data_ptr(),
        cos_PD2.data_ptr(),
        sin_PD2.data_ptr(),
        half,
        int(inverse),
    )
    return x_TND


def _check(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    T, _, D = x.shape
    require_like(x, x=x)
    require_index(torch.int64, positions=positions)
    for table in (cos, sin):
        require(table.dtype == torch.float32 and table.is_contiguous(), "rope tables must be contiguous fp32")
    require(2 * cos.shape[1] <= D, f"tables of {cos.shape[1]} frequencies don't fit a head dim of {D}")
    require(positions.shape == (T,), f"positions of shape {tuple(positions.shape)} for {T} tokens")


def _apply_rope_reference_(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> torch.Tensor:
    half = cos.shape[1]
    x1, x2 = wide(x[..., :half]), wide(x[..., half : 2 * half])
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    if inverse:
        s = -s
    rotated = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
    x[..., : 2 * half] = rotated.to(x.dtype)
    return x
