"""Whether the server takes work, and what is still running when it stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from coserve.engine.client import EngineClient
from coserve.errors import Unavailable


class Lifecycle:
    """Counts work in flight; while draining, nothing new begins."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.stopped = asyncio.Event()

    @property
    def ready(self) -> bool:
        """True when a request sent now can be served."""
        return self._engine.ready and not self.draining

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._in_flight

    async def readiness(self) -> AsyncIterator[bool]:
        """Whether requests can be served: now, and whenever that has changed."""
        while True:
            told = self.ready
            yield told
            while self.ready == told:
                await self._engine.turned()

    def check_open(self) -> None:
        """Raise Unavailable once the server is shutting down."""
        if self.draining:
            raise Unavailable("The server is shutting down.", retry_after=5.0, code="shutting_down")

    def check_ready(self) -> None:
        """Raise Unavailable while nothing can be generated."""
        self.check_open()
        if not self._engine.ready:
            raise Unavailable("The engine is starting; try again in a moment.", code="engine_starting")

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Hold the server open for one piece of work."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Take nothing new, wait for what runs; True when all of it ended within `timeout` seconds."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        finally:
            self.stopped.set()
        return True
