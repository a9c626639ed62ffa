"""uvicorn's HTTP/1.1 protocol with bounds: how large a request's head may be, how long a client may stall.

Without them a client that sends headers for ever, or nothing at all, or never reads its answer, would hold
memory and a connection for as long as it likes. What is refused here gets OpenAI's envelope as everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coserve.log import line
from coserve.server.http import request_id

logger = logging.getLogger(__name__)

MAX_TARGET_BYTES = 16 * 2**10  # of the request line: path and query
MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 2**10  # names and values of all headers
MAX_PIPELINED = 16  # requests that wait for the answer to the one before
MIN_RATE = 256  # bytes a second of a body, over one timeout
_LINGER_BYTES = 2**20  # that a refused client may still send
_LINGER = 2.0  # seconds in which a refused client may still send: a reset would take the answer from it


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `timeout` is in seconds: for a whole head, for a body to move on at `MIN_RATE`, and for
    a client to take some of its answer. `refused` hears the code of each refusal."""

    timeout = 60.0
    refused: Callable[[str], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # it would hold whole queries
        self._in_head = self._in_body = self._is_refused = False
        self._head_bytes = self._body_bytes = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._fault: tuple[HTTPStatus, str, str] | None = None

    # ------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reading = self.loop.call_later(self.timeout, self._late_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._head_bytes += len(data)
            if self._head_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        began_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(
                *(self._fault or (HTTPStatus.BAD_REQUEST, "invalid_http", "The request is not valid HTTP."))
            )
        except httptools.HttpParserUpgrade:
            if self.cycle is not None:  # answered as HTTP/1.1; what comes after it would be another protocol
                self.cycle.keep_alive = False
        if began_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_TARGET_BYTES + MAX_HEAD_BYTES:
                self._refuse(*_HEAD_TOO_LARGE)

    # ------------------------------------------------------------------ one request

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._stop_reading_timer()
        self._reading = self.loop.call_later(self.timeout, self._late_head)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_reading_timer()
        size = sum(len(name) + len(value) for name, value in self.headers)
        if len(self.url) > MAX_TARGET_BYTES:
            self._fault = _TARGET_TOO_LONG
        elif len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            self._fault = _HEAD_TOO_LARGE
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._fault = _TOO_MANY
        if self._fault is not None:
            raise ValueError(self._fault[1])
        super().on_headers_complete()
        self._in_body, self._body_bytes = True, 0
        self._reading = self.loop.call_later(self.timeout, self._late_body)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop_reading_timer()
        super().on_message_complete()

    # ------------------------------------------------------------------ stalling

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_writing_timer()
        self._writing = self.loop.call_later(self.timeout, self._late_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing_timer()

    def _late_head(self) -> None:
        if self._in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The headers did not come in time.")
        else:  # not a byte yet
            self.transport.close()

    def _late_body(self) -> None:
        if self.flow.read_paused or self._body_bytes >= MIN_RATE * self.timeout:
            self._body_bytes = 0
            self._reading = self.loop.call_later(self.timeout, self._late_body)
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The body did not come in time.")

    def _late_reader(self) -> None:
        logger.info(line("client cut off", reason="it reads nothing of its answer", seconds=self.timeout))
        self.refused("reader_too_slow")
        self.transport.abort()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    # ------------------------------------------------------------------ refusing

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        """Answer what can't be read as a request, and end the connection; an answer under way to an earlier
        request goes out whole."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused, self._head_bytes = True, 0
        self._stop_reading_timer()
        identity = request_id("")
        logger.info(line("http refused", id=identity, status=status.value, code=code))
        self.refused(code)
        cycle = self.cycle
        if self._in_body and cycle.response_complete:
            self.transport.close()
            return
        if cycle is not None and not cycle.response_complete:
            if not self._in_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started or self.pipeline:
                self.transport.close()
                return
        self.transport.write(_answer(status, code, message, identity))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(min(_LINGER, self.timeout), self.transport.close)


_HEAD_TOO_LARGE = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "headers_too_large",
    f"The headers are over the limit of {MAX_HEADERS}, or of {MAX_HEAD_BYTES} bytes.",
)
_TOO_MANY = (
    HTTPStatus.BAD_REQUEST,
    "too_many_pipelined",
    f"More than {MAX_PIPELINED} requests wait on this connection.",
)
_TARGET_TOO_LONG = (
    HTTPStatus.REQUEST_URI_TOO_LONG,
    "uri_too_long",
    f"The path and query are over the limit of {MAX_TARGET_BYTES} bytes.",
)


def _answer(status: HTTPStatus, code: str, message: str, identity: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = msgspec.json.encode({"error": error})
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {identity}\r\nx-content-type-options: nosniff\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def bounded(seconds: float, refused: Callable[[str], None]) -> type[BoundedProtocol]:
    """The protocol with a timeout of its own; 0 is a day, as good as none."""
    own = {"timeout": seconds or 86400.0, "refused": staticmethod(refused)}
    return type("BoundedProtocol", (BoundedProtocol,), own)
