"""The server's event loop: uvloop, with gRPC's completions handed over in the cheaper of its two ways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvloop


class Loop(uvloop.Loop):
    """A thread of gRPC's waits for completed operations. Where it can, it writes a byte to a socket for each
    and the loop reads it: two system calls and a turn of the loop a message. On loops that can't watch
    sockets it calls `call_soon_threadsafe`, which wakes the loop once for many."""

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        """Refuses gRPC's socket alone."""
        watcher = getattr(getattr(callback, "func", None), "__self__", None)
        if type(watcher).__name__ == "PollerCompletionQueue":
            asyncio.AbstractEventLoop.add_reader(self, fd, callback, *args)  # what a loop says that can't
        super().add_reader(fd, callback, *args)
