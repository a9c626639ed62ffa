"""AdamW with moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

Within a block of 256 elements a moment is kept as  code[q] * absmax,  q uint8 into a map whose values lie
densely near zero: in the decade 10^(i-6), i = 0..6, the midpoints of 2^i (signed, for m) or 2^(i+1)
(unsigned, for v) equal parts of [0.1, 1], and 0 and 1. A step takes both moments to fp32, does what
kernels/adamw.py does, and rounds them to the nearest code; the weights see the moments before rounding.

One departure: a second moment that isn't zero never becomes zero. As zero it would let the next step divide m
by sqrt((1 - beta2) g^2) alone and move its weight far too far: with gradients over three powers of ten in a
block, 60 steps end 2.7 times the way off that fp32 goes, with the departure 0.12 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from coserve.kernels.dispatch import native_for, require_flat, triton_or_reference

BLOCK = 256
DECADES = 7


@cache
def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values of a code, ascending fp32; signed in [-1, 1] for m, else in [0, 1] for v."""
    values = [0.0, 1.0]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**i + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - DECADES)).tolist()
        values += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def map_edges(signed: bool) -> torch.Tensor:
    """fp32 [255]: above edge i a value is nearer to code i + 1. The unsigned map's first edge is 0."""
    values = dynamic_map(signed)
    edges = (values[1:] + values[:-1]) / 2
    if not signed:
        edges[0] = 0.0
    return edges


@cache
def code_table(signed: bool) -> torch.Tensor:
    """uint8 [65536]: the code of the least finite float whose upper 16 bits are the index; within such a
    float's neighbours there is at most one edge."""
    upper = torch.arange(1 << 16, dtype=torch.int32)
    lower = (upper >> 15) * 0xFFFF  # of negative floats the longest is the least
    least = ((upper << 16) | lower).view(torch.float32).nan_to_num(nan=0.0)
    return torch.bucketize(least, map_edges(signed)).clamp_(max=254).to(torch.uint8)


@dataclass(frozen=True)
class QuantizedMoments:
    """The moments of the blocks of a flat buffer of parameters.

    starts_B, lengths_B (1 to 256) int64: where each block lies in the buffer; ratio_B fp32: its learning
    rate's factor. m_BE, v_BE uint8 [B, 256] codes, m_scale_B, v_scale_B fp32 their absmax.
    """

    starts_B: torch.Tensor
    lengths_B: torch.Tensor
    ratio_B: torch.Tensor
    m_BE: torch.Tensor
    v_BE: torch.Tensor
    m_scale_B: torch.Tensor
    v_scale_B: torch.Tensor

    @classmethod
    def zeros(
        cls, spans: list[tuple[int, int, float]], device: torch.device | str = "cpu"
    ) -> QuantizedMoments:
        """For the spans (start, end, learning rate's factor) of a buffer, each cut into blocks by itself."""
        blocks = [
            (start, min(BLOCK, end - start), ratio)
            for first, end, ratio in spans
            for start in range(first, end, BLOCK)
        ]
        starts, lengths, ratios = zip(*blocks, strict=True) if blocks else ((), (), ())
        count = len(blocks)
        return cls(
            torch.tensor(starts, dtype=torch.int64, device=device),
            torch.tensor(lengths, dtype=torch.int64, device=device),
            torch.tensor(ratios, dtype=torch.float32, device=device),
            torch.full((count, BLOCK), _zero_code(True), dtype=torch.uint8, device=device),
            torch.full((count, BLOCK), _zero_code(False), dtype=torch.uint8, device=device),
            torch.zeros(count, device=device),
            torch.zeros(count, device=device),
        )

    def blocks(self, first: int, last: int) -> QuantizedMoments:
        """Views of the blocks [first, last)."""
        return QuantizedMoments(*(tensor[first:last] for tensor in vars(self).values()))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the blocks' places."""
        return sum(tensor.nbytes for tensor in vars(self).values())


def adamw_8bit_(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: QuantizedMoments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Update `moments` and, at their blocks, flat fp32 `param` in place; `step` counts from 1.

    `grad` is kept; `grad_scale` multiplies it first (clipping).
    """
    require_flat(param, grad=grad)
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** 0.5
    numbers = (step_size, beta1, beta2, eps, lr * weight_decay, root_correction, grad_scale)
    native = native_for(param)
    if native is None:
        triton_or_reference(param, _adamw_8bit_reference_)(param, grad, moments, *numbers)
        return
    native.adamw_8bit(
        param.data_ptr(),
        grad.data_ptr(),
        len(moments.starts_B),
        *(tensor.data_ptr() for tensor in vars(moments).values()),
        *(
            table(signed).data_ptr()
            for signed in (True, False)
            for table in (dynamic_map, map_edges, code_table)
        ),
        *numbers,
    )


def _zero_code(signed: bool) -> int:
    return int((dynamic_map(signed) == 0).nonzero()[0])


def _quantize(values_BE: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    scale_B = values_BE.abs().amax(1)
    unit_BE = values_BE / torch.where(scale_B > 0, scale_B, 1.0)[:, None]
    edges = map_edges(signed).to(values_BE.device)
    return torch.bucketize(unit_BE, edges).to(torch.uint8), scale_B


def _adamw_8bit_reference_(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: QuantizedMoments,
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    root_correction: float,
    grad_scale: float,
) -> None:
    within_E = torch.arange(BLOCK, device=param.device)
    real_BE = within_E < moments.lengths_B[:, None]
    places_BE = torch.where(real_BE, moments.starts_B[:, None] + within_E, 0)
    g = torch.where(real_BE, grad[places_BE] * grad_scale, 0.0)
    signed, unsigned = (dynamic_map(kind).to(param.device) for kind in (True, False))
    m = signed[moments.m_BE.long()] * moments.m_scale_B[:, None]
    v = unsigned[moments.v_BE.long()] * moments.v_scale_B[:, None]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    ratio_B1 = moments.ratio_B[:, None]
    p = param[places_BE] * (1 - decay * ratio_B1)
    p -= step_size * ratio_B1 * (m / ((v.sqrt() / root_correction).add_(eps)))
    param[places_BE[real_BE]] = p[real_BE]
    for values, codes, scales, kind in (
        (m, moments.m_BE, moments.m_scale_B, True),
        (v, moments.v_BE, moments.v_scale_B, False),
    ):
        code_BE, scale_B = _quantize(values, kind)
        codes.copy_(code_BE)
        scales.copy_(scale_B)
