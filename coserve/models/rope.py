"""Rotary tables: cos and sin of every position, computed once and shared by the layers."""

from __future__ import annotations

import math

import torch

from coserve.layers.attention import RopeTable
from coserve.models.config import ModelConfig
from coserve.models.rope_settings import RopeScaling


def make_rope_table(
    config: ModelConfig, device: torch.device | str = "cpu", *, local: bool = False
) -> RopeTable:
    """cos, sin fp32 [max positions, rotary/2]: angle = position * theta^(-2i/rotary), stretched as the file
    says. `local` is the table of sliding layers where they have a theta of their own, which is never
    stretched."""
    dim = config.rotary_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    theta, scaling, magnitude = config.rope_theta, config.rope_scaling, 1.0
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    frequency = 1.0 / (theta**exponent)
    if scaling is not None:
        frequency = _stretched(frequency, scaling, theta, dim, config.max_position_embeddings)
        magnitude = scaling.attention_factor
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angle_PD2 = positions[:, None] * frequency[None, :]
    return RopeTable((angle_PD2.cos() * magnitude).to(device), (angle_PD2.sin() * magnitude).to(device))


def _stretched(
    frequency: torch.Tensor, scaling: RopeScaling, theta: float, dim: int, longest: int
) -> torch.Tensor:
    original = scaling.original_max_position_embeddings
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        # One table for all: which one follows from the context that is served, so that a cached key stays
        # right however long its sequence grows.
        factors = scaling.long_factors if longest > original else scaling.short_factors
        return frequency / torch.tensor(factors)
    if scaling.kind == "yarn":
        return _yarn(frequency, scaling, theta, dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequency
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    slow = frequency / scaling.factor
    return torch.where(smooth <= 0, slow, torch.where(smooth >= 1, frequency, blended))


def _yarn(frequency: torch.Tensor, scaling: RopeScaling, theta: float, dim: int) -> torch.Tensor:
    """Frequencies that turn fewer than `low_freq_factor` times in the original context are stretched, those
    over `high_freq_factor` times kept, a ramp between them."""
    span = scaling.original_max_position_embeddings

    def feature(turns: float) -> float:
        return dim * math.log(span / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = feature(scaling.high_freq_factor), feature(scaling.low_freq_factor)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2).float() - first) / (last - first if last != first else 0.001)
    stretched = ramp.clamp(0, 1)
    return frequency / scaling.factor * stretched + frequency * (1 - stretched)
