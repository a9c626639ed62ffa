"""The outputs of one request on their way from the engine to its reader, who may be slower."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from coserve.engine.messages import Fault, RequestOutput
from coserve.errors import ReaderTooSlow

MAX_BEHIND = 8192  # tokens, and alternatives of their log-probabilities, that a reader may be behind


class OutputStream:
    """An async iterator of a request's outputs until its last. Closing it early aborts the request.

    `begin` sends the request, when the first output is asked for; `abort` ends it in the engine; `forget`
    says that no more outputs are wanted here. What a reader doesn't take is kept up to `MAX_BEHIND`; then the
    request is aborted, and the reader gets what was kept and ReaderTooSlow after it.
    """

    def __init__(
        self, begin: Callable[[], Awaitable[None]], abort: Callable[[], None], forget: Callable[[], None]
    ) -> None:
        self._begin: Callable[[], Awaitable[None]] | None = begin
        self._abort = abort
        self._forget = forget
        self._kept: deque[RequestOutput] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._is_running = False  # in the engine, as far as is known here
        self._ended = False

    def put(self, output: RequestOutput) -> None:
        """Take an output in."""
        if not self._is_running:
            return
        if output.finish_reason is not None:
            self._is_running = False
        elif self._kept and len(self._kept) * _weight(output) > MAX_BEHIND:
            output = self._give_up(output)
        self._kept.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _give_up(self, output: RequestOutput) -> RequestOutput:
        self._is_running = False
        self._abort()
        error = ReaderTooSlow(
            f"The reader is more than {MAX_BEHIND} tokens behind; the rest was not generated."
        )
        return RequestOutput(request_id=output.request_id, finish_reason="error", error=Fault.of(error))

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises the error that ended the request; Unavailable when the engine is down."""
        if self._ended:
            raise StopAsyncIteration
        if self._begin is not None:
            begin, self._begin = self._begin, None
            self._is_running = True
            try:
                await begin()
            except BaseException:
                await self.aclose()
                raise
        while not self._kept:
            self._reader = self._loop.create_future()
            await self._reader
        output = self._kept.popleft()
        if output.finish_reason is not None:
            await self.aclose()
            if output.error is not None:
                raise output.error.to_error()
        return output

    async def aclose(self) -> None:
        """Want no more; what still runs is aborted."""
        if self._ended:
            return
        self._ended = True
        self._forget()
        if self._is_running:
            self._is_running = False
            self._abort()


def _weight(output: RequestOutput) -> int:
    beside = len(output.logprobs[0].top) if output.logprobs else 0
    return len(output.token_ids) * (1 + beside)
