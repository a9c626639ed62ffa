"""Calls whose client takes no more messages: HTTP/2 lets it hold them for ever, this ends them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from coserve.log import line

logger = logging.getLogger(__name__)

_LOOKS = 4  # within the time that a client has


class Stalls:
    """Cancels the tasks of calls whose client has left one message untaken for `seconds`; 0: never."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[asyncio.Task[Any], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def begin(self, task: asyncio.Task[Any]) -> None:
        """A call hands a message over."""
        self._since[task] = self._loop.time()
        if self._timer is None and self._seconds > 0.0:
            self._timer = self._loop.call_later(self._seconds / _LOOKS, self._look)

    def end(self, task: asyncio.Task[Any]) -> None:
        """It was taken, or the call is over."""
        self._since.pop(task, None)

    def _look(self) -> None:
        before = self._loop.time() - self._seconds
        for task, since in list(self._since.items()):
            if since <= before:
                logger.info(line("client cut off", reason="it takes no messages", seconds=self._seconds))
                self.end(task)
                task.cancel()
        self._timer = self._loop.call_later(self._seconds / _LOOKS, self._look) if self._since else None
