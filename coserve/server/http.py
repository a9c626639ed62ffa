"""HTTP plumbing shared by all routes: bodies in, JSON and event streams out, errors as envelopes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coserve import errors
from coserve.server.errors import envelope, http_headers, http_status, told
from coserve.server.fields import Fields

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 32 * 2**20
MAX_BODIES_BYTES = 16 * MAX_JSON_BYTES
_CLIENT_GONE = 499
_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """One method of one path, and the right (a role of auth.py) that it needs."""

    method: str
    path: str
    handler: Handler
    right: str


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(_encode(content), status, headers, media_type="application/json")


def error_response(error: Exception) -> Response:
    """OpenAI's envelope; details of anything outside the error tree stay in the log."""
    failure = told(error, logger, "unexpected error")
    status, _ = http_status(failure)
    return json_response(envelope(failure), status, http_headers(failure))


def request_id(given: str) -> str:
    """The client's X-Request-Id where it is a plain short word, else a new one."""
    return given if _is_plain(given) else uuid.uuid4().hex


def _is_plain(name: str) -> bool:
    return 0 < len(name) <= 128 and name.isascii() and name.isprintable() and " " not in name


def read_request_id(fields: Fields) -> str | None:
    """The name that a request gives itself; InvalidRequest when that is none."""
    given = fields.string("request_id")
    if given is not None and not _is_plain(given):
        raise fields.fail("request_id", "must be at most 128 characters of ASCII without spaces.")
    return given


def take_request_id(request: Request, fields: Fields) -> None:
    """Where no header names the request its body's `request_id` does; InvalidRequest when that is no name."""
    given = read_request_id(fields)
    if given is not None and "x-request-id" not in request.headers:
        request.state.request_id = given


def media_type(request: Request) -> str:
    """The `Content-Type` without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> Fields:
    """The body as a JSON object; `request.state.size` is its length in bytes.

    Raises UnsupportedMediaType, PayloadTooLarge (over 32 MiB), or InvalidRequest.
    """
    content_type = media_type(request)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise errors.UnsupportedMediaType("The body must be JSON: send Content-Type: application/json.")
    body = await read_body(request, MAX_JSON_BYTES)
    request.state.size = len(body)
    try:
        return Fields(_decode(body))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise errors.InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


class BodyMemory:
    """What the bodies that are being read may have of the memory together, in bytes: slow clients, each
    within its own limit, would else fill it."""

    def __init__(self, limit: int = MAX_BODIES_BYTES) -> None:
        self.left = limit

    def share(self) -> BodyShare:
        """One request's part of it."""
        return BodyShare(self)


class BodyShare:
    """What one request has taken."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._taken = 0

    def take(self, count: int) -> None:
        """Room for `count` bytes more. Raises Unavailable when there is none."""
        if count > self._memory.left:
            raise errors.Unavailable(
                "The server is reading as many bodies as it has memory for; try again.", code="bodies_full"
            )
        self._memory.left -= count
        self._taken += count

    def release(self) -> None:
        """Give all of it back; once is enough."""
        self._memory.left += self._taken
        self._taken = 0


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; PayloadTooLarge once it passes `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise errors.PayloadTooLarge(f"The body is over the limit of {limit} bytes.")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise errors.PayloadTooLarge(f"The body is over the limit of {limit} bytes.")
        request.state.body_memory.take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client goes away (its body has been read)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancel(task, gone)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: `data: JSON`, ended by `data: [DONE]`, also after an error.

    `events` come in lists of those that go out together, and have had the first list taken already
    (`first`), so whatever can be refused was refused before the status line. A client that leaves closes the
    iterator. Where nothing was sent for `keep_alive` seconds (0: never) a comment goes out, so that proxies
    don't take the connection for dead.
    """

    end = b"data: [DONE]\n\n"

    def __init__(
        self, first: Sequence[object], events: AsyncIterator[Sequence[object]], keep_alive: float
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._keep_alive = keep_alive
        self._sent_at = asyncio.get_running_loop().time()

    @classmethod
    async def open(
        cls, request: Request, events: AsyncIterator[Sequence[object]], keep_alive: float
    ) -> EventStream:
        """Wait for the first events; their error is the request's error."""
        try:
            first = await until_disconnect(request, _next(events))
        except BaseException:
            await events.aclose()  # type: ignore[attr-defined]
            raise
        return cls(first, events, keep_alive)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_gone(receive))
        beside = [asyncio.ensure_future(self._beat(send))] if self._keep_alive else []
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _cancel(task, gone, *beside)

    async def _beat(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            idle = loop.time() - self._sent_at
            if idle < self._keep_alive:
                await asyncio.sleep(self._keep_alive - idle)
            else:
                self._sent_at = loop.time()
                await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send(send, self._first)
            try:
                async for together in events:
                    await self._send(send, together)
            except OSError:
                return
            except Exception as error:
                failure = told(error, logger, "unexpected error in a stream")
                await self._send(send, [envelope(failure)])
            await send({"type": "http.response.body", "body": self.end, "more_body": False})

    async def _send(self, send: Send, events: Sequence[object]) -> None:
        body = b"".join([self.frame(event) for event in events])
        if self._keep_alive:
            self._sent_at = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    @staticmethod
    def frame(event: Any) -> bytes:
        """One event as it is sent."""
        return b"data: " + _encode(event) + b"\n\n"


async def _next(events: AsyncIterator[Sequence[object]]) -> Sequence[object]:
    return await anext(events)


def gone_response() -> Response:
    """What stands in the log for a client that left; nobody sees it."""
    return Response(status_code=_CLIENT_GONE)
