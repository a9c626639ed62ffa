"""Large requests are read in a thread of their own: streams don't wait while a prompt is tokenised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE = 16 * 2**10  # bytes of a body; tokenising so many takes some milliseconds
_T = TypeVar("_T")
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")  # one: the engine needs the cores


async def prepared(make: Callable[[], _T], size: int) -> _T:
    """What `make` returns or raises, of a request of `size` bytes. It reads what it needs and changes nothing
    that others see."""
    if size < LARGE:
        return make()
    return await asyncio.get_running_loop().run_in_executor(_thread, make)
