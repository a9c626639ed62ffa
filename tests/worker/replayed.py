"""CUDA graphs' stand-in on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coserve.worker.cuda_graph import Run


class ReplayedFunctions:
    """Captures by keeping the function, replays by calling it again, into the tensor it gave first."""

    def __init__(self) -> None:
        self.captures = 0
        self.plays = 0
        self.pending = 0

    def capture(self, run: Run) -> Run:
        self.captures += 1
        assert self.pending == 1
        result = run()

        def play() -> torch.Tensor:
            self.plays += 1
            return result.copy_(run())

        return play

    def mark(self) -> Callable[[], None]:
        self.pending += 1

        def wait() -> None:
            self.pending -= 1

        self.pending = 1
        return wait
