"""Dropout masks inside other kernels; the same bits as coserve/kernels/dropout.py, which has the formula."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def threshold_of(rate):
    """What a hash must reach to stay: uint32 of a float64 rate."""
    return (rate * 4294967296.0).to(tl.int64).to(tl.uint32)


@triton.jit
def kept(key, salt, feature, threshold):
    """Which of [T, F] elements stay: int64 keys [T], int64 salt, features [F]."""
    x = (key ^ salt).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    low, high = x.to(tl.uint32), (x >> 32).to(tl.uint32)
    u = feature.to(tl.uint32)[None, :] * 0x9E3779B1 + low[:, None]
    u = (u ^ (u >> 16)) * 0x7FEB352D + high[:, None]
    u = (u ^ (u >> 15)) * 0x846CA68B
    return (u ^ (u >> 16)) >= threshold
