"""Dropout masks from counters, for LoRA's input (Srivastava et al. 2014).

    keep[t, f] = hash(key[t], salt, f) >= rate * 2^32,   x -> keep * x / (1 - rate)

`key` names the token (seed, optimizer step, example, position), `salt` the module, f the feature. A mask is
therefore never stored and never depends on how tokens were batched, cut or replayed. The 64-bit mix is
splitmix64's (Steele et al. 2014), the 32-bit one's constants are those of Wellons' hash-prospector; C++
computes the same bits in csrc/dropout.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from coserve.kernels.dispatch import require

_MASK32 = 0xFFFFFFFF
_GOLDEN64, _MIX64_A, _MIX64_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN32, _MIX32_A, _MIX32_B = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


@dataclass(frozen=True)
class Dropout:
    """The mask of some rows in one module.

    `keys_T` int64 [T], `rates_S` float64 [S] in [0, 1): one for each LoRA segment, or one in all. ValueError
    for other dtypes or layouts.
    """

    keys_T: torch.Tensor
    rates_S: torch.Tensor
    salt: int = 0

    def __post_init__(self) -> None:
        require(
            self.keys_T.dtype == torch.int64 and self.keys_T.is_contiguous(), "keys must be contiguous int64"
        )
        require(
            self.rates_S.dtype == torch.float64 and self.rates_S.is_contiguous(),
            "rates must be contiguous float64",
        )

    def salted(self, salt: int) -> Dropout:
        """The same rows in the module of this salt."""
        return replace(self, salt=salt)

    @property
    def pointers(self) -> tuple[int, int]:
        """Addresses of keys and rates, as the C++ kernels take them."""
        return self.keys_T.data_ptr(), self.rates_S.data_ptr()


def row_keys(seed: int, step: int, example: int, positions: np.ndarray) -> np.ndarray:
    """int64 keys of one example's tokens at `positions` in an optimizer step."""
    key = 0
    for part in (seed, step, example):
        key = _mix64_int(key ^ part)
    with np.errstate(over="ignore"):
        mixed = positions.astype(np.uint64) * np.uint64(_GOLDEN64) + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX64_A)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX64_B)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)


@cache
def module_salt(layer: int, module: int) -> int:
    """The salt of a module: int64, different for each (layer, module number)."""
    return _signed(_mix64_int(_mix64_int(layer) ^ module))


def keep_mask(keys_T: torch.Tensor, salt: int, features: int, rate: torch.Tensor) -> torch.Tensor:
    """bool [T, features]: which elements stay; `rate` is a float64 scalar. The reference of the kernels."""
    key = _mix64(keys_T ^ salt)[:, None]
    feature = torch.arange(features, dtype=torch.int64, device=keys_T.device)
    u = (feature * _GOLDEN32 + (key & _MASK32)) & _MASK32
    u = ((u ^ (u >> 16)) * _MIX32_A) & _MASK32
    u = (u + (_shift(key, 32))) & _MASK32
    u = ((u ^ (u >> 15)) * _MIX32_B) & _MASK32
    u = u ^ (u >> 16)
    return u >= (rate * 2.0**32).to(torch.int64)


def _mix64_int(x: int) -> int:
    x = (x + _GOLDEN64) & (1 << 64) - 1
    x = (x ^ (x >> 30)) * _MIX64_A & (1 << 64) - 1
    x = (x ^ (x >> 27)) * _MIX64_B & (1 << 64) - 1
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = x + _signed(_GOLDEN64)
    x = (x ^ _shift(x, 30)) * _signed(_MIX64_A)
    x = (x ^ _shift(x, 27)) * _signed(_MIX64_B)
    return x ^ _shift(x, 31)
