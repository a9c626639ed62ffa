"""Waiting for a job's events."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes those who wait for anything new about a job."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def next(self, job_id: str) -> asyncio.Future[None]:
        """A future that ends with the next change; take it before reading what is there."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, []).append(future)
        return future

    def forget(self, job_id: str, future: asyncio.Future[None]) -> None:
        """Stop waiting."""
        future.cancel()
        waiting = self._waiting.get(job_id, [])
        if future in waiting:
            waiting.remove(future)
        if not waiting:
            self._waiting.pop(job_id, None)

    def notify(self, job_id: str) -> None:
        """Something about the job has changed."""
        for future in self._waiting.pop(job_id, []):
            if not future.done():
                future.set_result(None)
