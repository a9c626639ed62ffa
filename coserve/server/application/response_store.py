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


class ResponseStore:
    """The newest responses, at most so many and of so many bytes of JSON."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: StoredResponse) -> None:
        """Keep one more; the oldest go where there is no room."""
        size = len(msgspec.json.encode((response.body, response.items, response.messages)))
        self._kept[response.id] = (response, size)
        self._bytes += size
        while len(self._kept) > self._max_responses or self._bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def get(self, response_id: str, tenant: str) -> StoredResponse:
        """One by its id; NotFound, also for those of others."""
        found = self._kept.get(response_id)
        if found is None or found[0].tenant != tenant:
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
        _, freed = self._kept.pop(response_id)
        self._bytes -= freed
