"""Responses that were kept, so that a later request can go on from one: in memory, bounded, the oldest first.

What was said is not written to disk: it is gone with the server, as it is once newer ones need the room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from coserve.errors import InvalidRequest, NotFound

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """A response's body, the items that it was asked with, and the conversation up to its end as messages.

    `tenant` is whose key asked: nobody else finds it.
    """

    body: dict[str, Any]
    items: Sequence[dict[str, Any]]
    messages: Sequence[dict[str, Any]]
    tenant: str = ""

    @property
    def id(self) -> str:
        """Its id, which nobody guesses."""
        return str(self.body["id"])


class _Kept:
    """One tenant's responses, oldest first, and their bytes of JSON."""

    def __init__(self) -> None:
        self.responses: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.bytes = 0

    def add(self, response: StoredResponse) -> None:
        size = len(msgspec.json.encode((response.body, response.items, response.messages)))
        self.responses[response.id] = (response, size)
        self.bytes += size

    def remove(self, response_id: str) -> None:
        _, size = self.responses.pop(response_id)
        self.bytes -= size


class ResponseStore:
    """The newest responses, at most so many and so many bytes of JSON. Where there is no room the oldest of
    the tenant that has most go: nobody pushes out those of others who have less."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._tenants: dict[str, _Kept] = {}

    def __len__(self) -> int:
        return sum(len(kept.responses) for kept in self._tenants.values())

    def keep(self, response: StoredResponse) -> None:
        """Keep one more; others go where there is no room."""
        self._tenants.setdefault(response.tenant, _Kept()).add(response)
        while len(self) > self._max_responses:
            self._drop_oldest(max(self._tenants, key=lambda name: len(self._tenants[name].responses)))
        while sum(kept.bytes for kept in self._tenants.values()) > self._max_bytes:
            self._drop_oldest(max(self._tenants, key=lambda name: self._tenants[name].bytes))

    def _drop_oldest(self, tenant: str) -> None:
        self._remove(next(iter(self._tenants[tenant].responses)), tenant)

    def _remove(self, response_id: str, tenant: str) -> None:
        self._tenants[tenant].remove(response_id)
        if not self._tenants[tenant].responses:
            del self._tenants[tenant]

    def get(self, response_id: str, tenant: str) -> StoredResponse:
        """One by its id; NotFound, also for those of others."""
        kept = self._tenants.get(tenant)
        found = kept.responses.get(response_id) if kept is not None else None
        if found is None:
            raise NotFound(
                f"There is no response {response_id[:80]!r}: it was deleted or not kept.", param="id"
            )
        return found[0]

    def before(self, response_id: str | None, tenant: str) -> Sequence[dict[str, Any]]:
        """The conversation that a request goes on from; InvalidRequest where that isn't kept."""
        if response_id is None:
            return ()
        try:
            return self.get(response_id, tenant).messages
        except NotFound:
            raise InvalidRequest(
                f"previous_response_id {response_id[:80]!r} is not found; send the whole conversation.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None

    def delete(self, response_id: str, tenant: str) -> None:
        """Forget one; NotFound."""
        self.get(response_id, tenant)
        self._remove(response_id, tenant)
