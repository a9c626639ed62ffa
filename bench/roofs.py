"""What the machine can do at most, measured on the spot: bytes and arithmetic operations a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from coserve.kernels.linear import PackedLinear


@dataclass(frozen=True)
class Roofs:
    """Bytes a second of a large copy (read and write counted), operations a second of the best product."""

    bandwidth: float
    arithmetic: float

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for so much arithmetic and so many bytes."""
        return max(operations / self.arithmetic, moved / self.bandwidth)


def best(run: Callable[[], Any], times: int = 7) -> float:
    """Shortest seconds of several runs."""
    run()
    shortest = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def measure_roofs(dtype: torch.dtype) -> Roofs:
    """On all threads, now. The product is ours or torch's, whichever is faster."""
    source = torch.ones(1 << 28, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    rows, width = 256, 2048
    weight, x = torch.randn(width, width).to(dtype), torch.randn(rows, width).to(dtype)
    linear = PackedLinear(weight)
    seconds = min(best(lambda: linear.forward(x), 20), best(lambda: F.linear(x, weight), 20))
    return Roofs(bandwidth, 2.0 * rows * width * width / seconds)
