"""Whether an engine answers, as something whose changes can be waited for."""

from __future__ import annotations

import asyncio


class Readiness:
    """`ready` is False while the engine starts or restarts."""

    def __init__(self) -> None:
        self._ready = False
        self._turned = asyncio.Event()

    @property
    def ready(self) -> bool:
        """True while requests can be sent."""
        return self._ready

    @ready.setter
    def ready(self, now: bool) -> None:
        if now != self._ready:
            self._ready = now
            turned, self._turned = self._turned, asyncio.Event()
            turned.set()

    async def turned(self) -> None:
        """Wait for the next change."""
        await self._turned.wait()
