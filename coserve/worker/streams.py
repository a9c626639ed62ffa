"""Where the device runs training's units: after what was asked before, or beside it on a second stream.

On a GPU the forward has a stream of high priority and units have one of low priority. A unit begins when what
the forward's stream was given before the step, or before the last wait for it, is done, and what it wrote
becomes visible to that stream by an event when it is joined: before the step commits. Nothing runs beside
across two steps, so memory changes hands between steps alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Streams(Protocol):
    """What is asked of the device. `overlaps`: what is launched beside runs while the forward does."""

    overlaps: bool

    def begin_step(self) -> None:
        """What is launched beside from now on sees all that the forward's stream was given so far."""
        ...

    def beside(self) -> AbstractContextManager[None]:
        """What is launched inside is one unit."""
        ...

    def join(self) -> float:
        """Wait for the last unit, here and on the forward's stream; the seconds that it took."""
        ...

    def wait(self) -> None:
        """Wait for all that the forward's stream was given."""
        ...


class InOrder:
    """A CPU: a unit is done when it returns."""

    overlaps = False

    def __init__(self) -> None:
        self._seconds = 0.0

    def begin_step(self) -> None:
        """Everything given is done."""

    @contextmanager
    def beside(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds = time.perf_counter() - began

    def join(self) -> float:
        return self._seconds

    def wait(self) -> None:
        """Nothing is under way."""


class CudaStreams:
    """Makes a stream of high priority the calling thread's own, and one of low priority for units."""

    overlaps = True

    def __init__(self) -> None:
        self._forward = torch.cuda.Stream(priority=-1)
        self._forward.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(self._forward)
        self._units = torch.cuda.Stream(priority=0)
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._ready = torch.cuda.Event()

    def begin_step(self) -> None:
        self._forward.record_event(self._ready)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._units.wait_event(self._ready)
        with torch.cuda.stream(self._units):
            self._began.record()
            yield
            self._ended.record()

    def join(self) -> float:
        self._forward.wait_event(self._ended)
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1e3

    def wait(self) -> None:
        self._forward.synchronize()
        self.begin_step()
