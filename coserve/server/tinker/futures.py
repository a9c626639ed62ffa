"""Calls that are answered later: each has a request id, and its answer is asked for until it is there.

An id follows from who asks and from the call's number, so a call that is sent twice is done once. Answers are
kept for a while after they were given out, in case that was not received, and then forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from coserve.errors import (
    Conflict,
    CoserveError,
    FailedPrecondition,
    Gone,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
)
from coserve.server.auth import Key, owns
from coserve.server.errors import internal_error
from coserve.server.tinker.answers import Answer

logger = logging.getLogger(__name__)

MAX_PENDING = 8192  # of one key
MAX_REQUEST_BYTES = 256 << 20  # of the calls of one key that are pending
MAX_BYTES = 256 << 20  # of all answers that are kept
KEEP_TAKEN, KEEP_UNTAKEN = 60.0, 3600.0  # seconds
_RETRY = 1.0
_OF_THE_USER = (InvalidRequest, FailedPrecondition, NotFound, Conflict, PermissionDenied)


class Pending:
    """Calls without an answer, and the bytes of their requests."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0

    def count(self, sign: int, held: int) -> None:
        """One more of them, or one less."""
        self.calls += sign
        self.bytes += sign * held

    @property
    def full(self) -> bool:
        """No more may come."""
        return self.calls >= MAX_PENDING or self.bytes >= MAX_REQUEST_BYTES


class Future:
    """One call, of a request of `held` bytes. `early`: it waits for calls before it that haven't come.
    `queue_state` says what it waits for, in the client's words; `reason` explains it."""

    def __init__(self, request_id: str, session_id: str, tenant: str, digest: bytes, held: int) -> None:
        self.request_id, self.session_id, self.tenant, self.digest = request_id, session_id, tenant, digest
        self.held, self.early = held, False
        self.done = asyncio.Event()
        self.answer: Answer | None = None
        self.error: CoserveError | None = None
        self.queue_state, self.reason = "active", ""
        self.task: asyncio.Task[None] | None = None
        self.ended = 0.0
        self.taken = False
        self.can_be_cancelled = False

    @property
    def category(self) -> str:
        """Whose fault the error is: "user" or "server"."""
        return "user" if isinstance(self.error, _OF_THE_USER) else "server"

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return self.answer.size if self.answer is not None else 256


class Futures:
    """The futures of one server. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_id: dict[str, Future] = {}
        self._pending: dict[tuple[str, bool], Pending] = {}  # by tenant, and whether they are early
        self._bytes = 0

    def known(self, request_id: str, digest: bytes) -> Future | None:
        """The future of a call that came before. InvalidRequest where that was another one."""
        found = self._by_id.get(request_id)
        if found is not None and found.digest != digest:
            raise InvalidRequest(
                "This seq_id was used with another request.", param="seq_id", code="seq_id_reused"
            )
        return found

    def make(
        self,
        request_id: str,
        session_id: str,
        tenant: str,
        digest: bytes,
        *,
        held: int = 0,
        early: bool = False,
    ) -> Future:
        """A new one. RateLimited while too many of the key's are pending: those that are early have room of
        their own, so that the one they wait for finds some."""
        pending = self._pending_of(tenant, early)
        if pending.full:
            raise RateLimited(
                f"{pending.calls} calls are waiting for their answers; try again once some are there.",
                retry_after=_RETRY,
                code="too_many_pending",
            )
        future = self._by_id[request_id] = Future(request_id, session_id, tenant, digest, held)
        future.early = early
        pending.count(1, held)
        return future

    def in_turn(self, future: Future) -> None:
        """All calls before it are there."""
        if future.early and not future.done.is_set():
            self._pending_of(future.tenant, True).count(-1, future.held)
            self._pending_of(future.tenant, False).count(1, future.held)
        future.early = False

    def begin(self, future: Future, work: Awaitable[Answer]) -> asyncio.Task[None]:
        """Run what gives the answer."""
        future.task = asyncio.create_task(self._fulfil(future, work))
        return future.task

    async def _fulfil(self, future: Future, work: Awaitable[Answer]) -> None:
        try:
            self.resolve(future, await work)
        except asyncio.CancelledError:
            self.fail(future, Gone("The call was cancelled."))
            raise
        except CoserveError as error:
            self.fail(future, error)
        except Exception:
            logger.exception("a call failed")
            self.fail(future, internal_error())

    def resolve(self, future: Future, answer: Answer) -> None:
        """The answer is there."""
        if not future.done.is_set():
            future.answer = answer
            self._end(future)

    def fail(self, future: Future, error: CoserveError) -> None:
        """There will be no answer."""
        if not future.done.is_set():
            future.error = error
            self._end(future)

    def _end(self, future: Future) -> None:
        future.ended = self._clock()
        future.done.set()
        self._pending_of(future.tenant, future.early).count(-1, future.held)
        if future.request_id in self._by_id:
            self._bytes += future.size
            self._make_room()

    def _pending_of(self, tenant: str, early: bool) -> Pending:
        return self._pending.setdefault((tenant, early), Pending())

    def get(self, request_id: str, key: Key | None) -> Future:
        """Of this key's calls; Gone for one that isn't known any more, or never was."""
        found = self._by_id.get(request_id)
        if found is None or not owns(key, found.tenant):
            raise Gone(f"There is no call {request_id[:100]!r} any more; send it again.", param="request_id")
        return found

    def take(self, future: Future) -> None:
        """Its answer was given out."""
        if not future.taken:
            future.taken, future.ended = True, self._clock()

    def cancel(self, future: Future) -> None:
        """Nobody waits for it any more."""
        if future.task is not None:
            future.task.cancel()
        else:
            self.fail(future, Gone("The call was cancelled."))

    def sweep(self) -> None:
        """Forget what was taken, and what nobody comes for."""
        now = self._clock()
        for future in list(self._by_id.values()):
            keep = KEEP_TAKEN if future.taken else KEEP_UNTAKEN
            if future.done.is_set() and now - future.ended > keep:
                self._forget(future)

    def end_session(self, session_id: str) -> None:
        """Cancel and forget a session's."""
        for future in [f for f in self._by_id.values() if f.session_id == session_id]:
            if not future.done.is_set():
                self.cancel(future)
                self.fail(future, Gone("The session has ended."))
            self._forget(future)

    def _make_room(self) -> None:
        if self._bytes <= MAX_BYTES:
            return
        done = [future for future in self._by_id.values() if future.done.is_set()]
        for future in sorted(done, key=lambda future: (not future.taken, future.ended)):
            self._forget(future)
            if self._bytes <= MAX_BYTES:
                return

    def _forget(self, future: Future) -> None:
        if self._by_id.pop(future.request_id, None) is not None and future.done.is_set():
            self._bytes -= future.size
