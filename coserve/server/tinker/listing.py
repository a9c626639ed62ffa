"""Lists as this API pages them: by offset and limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.requests import Request

from coserve.errors import InvalidRequest
from coserve.server.openai.paging import query_limit

_T = TypeVar("_T")
_MOST = 1000


def query_offset(request: Request) -> int:
    """The query's `offset`, 0 or more."""
    raw = request.query_params.get("offset", "0")
    if not raw.isascii() or not raw.isdecimal() or len(raw) > 12:
        raise InvalidRequest("offset must be an integer of at least 0.", param="offset")
    return int(raw)


def page(
    request: Request, name: str, items: Sequence[_T], body: Callable[[_T], Any], default: int
) -> dict[str, Any]:
    """The items that the query asks for, under `name`, and where they stand among all."""
    offset, limit = query_offset(request), query_limit(request, default, _MOST)
    shown = [body(item) for item in items[offset : offset + limit]]
    return {name: shown, "cursor": {"offset": offset, "limit": limit, "total_count": len(items)}}


def moment(seconds: float | None) -> str | None:
    """A time as it is written here."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
