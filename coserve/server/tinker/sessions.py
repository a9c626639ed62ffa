"""Sessions: who holds models and samplers, for as long as its client gives a sign of life."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coserve.errors import Gone, NotFound, RateLimited
from coserve.server.auth import Key, owns, tenant_of

TIMEOUT = 300.0  # seconds without a sign of life; the client gives one every ten
MAX_SESSIONS = 1024  # of one key


@dataclass
class Session:
    """`model_ids` and `sampler_ids` are what was made in it."""

    id: str
    key: Key | None
    metadata: dict[str, Any] | None
    display_name: str | None
    last_seen: float
    model_ids: list[str] = field(default_factory=list)
    sampler_ids: list[str] = field(default_factory=list)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return tenant_of(self.key)


class Sessions:
    """Those that haven't ended. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_id: dict[str, Session] = {}

    def create(self, key: Key | None, metadata: dict[str, Any] | None, name: str | None) -> Session:
        """A new one. RateLimited where the key has too many."""
        own = sum(1 for session in self._by_id.values() if session.tenant == tenant_of(key))
        if own >= MAX_SESSIONS:
            raise RateLimited(
                f"There are {own} sessions; finish some.",
                retry_after=TIMEOUT / 10,
                code="too_many_sessions",
            )
        session = Session(uuid.uuid4().hex, key, metadata, name, self._clock())
        self._by_id[session.id] = session
        return session

    def get(self, session_id: str, key: Key | None) -> Session:
        """One of this key's, which gives a sign of life; Gone for one that has ended, or never was."""
        session = self._by_id.get(session_id)
        if session is None or not owns(key, session.tenant):
            raise Gone(f"The session {session_id[:100]!r} has ended.", param="session_id")
        session.last_seen = self._clock()
        return session

    def of(self, key: Key | None) -> list[Session]:
        """All of this key's, the newest first."""
        return [session for session in self._by_id.values() if owns(key, session.tenant)][::-1]

    def find(self, session_id: str, key: Key | None) -> Session:
        """One of this key's; NotFound. No sign of life."""
        session = self._by_id.get(session_id)
        if session is None or not owns(key, session.tenant):
            raise NotFound(f"There is no session {session_id[:100]!r}.", param="session_id")
        return session

    def all(self) -> list[Session]:
        """Everybody's."""
        return list(self._by_id.values())

    def remove(self, session_id: str) -> None:
        """It has ended."""
        self._by_id.pop(session_id, None)

    def silent(self) -> list[Session]:
        """Those without a sign of life for too long."""
        now = self._clock()
        return [session for session in self._by_id.values() if now - session.last_seen > TIMEOUT]
