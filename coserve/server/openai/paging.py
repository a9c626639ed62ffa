"""Lists as OpenAI pages them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from coserve.errors import InvalidRequest
from coserve.server.application.files import page

_T = TypeVar("_T")


def query_limit(request: Request, default: int, high: int) -> int:
    """The query's `limit`, 1 to `high`."""
    raw = request.query_params.get("limit")
    if raw is None:
        return default
    if not raw.isascii() or not raw.isdecimal() or not 1 <= int(raw) <= high:
        raise InvalidRequest(f"limit must be an integer from 1 to {high}.", param="limit")
    return int(raw)


def newest_first(request: Request) -> bool:
    """The query's `order`, which is desc unless it is asc."""
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc.", param="order")
    return order == "desc"


def list_body(
    request: Request, items: Sequence[_T], key: Callable[[_T], str], body: Callable[[_T], Any], limit: int
) -> dict[str, Any]:
    """One page of `items` after the query's `after`."""
    shown, more = page(items, [key(item) for item in items], request.query_params.get("after"), limit)
    return page_body(shown, more, key, body)


def page_body(
    shown: Sequence[_T], more: bool, key: Callable[[_T], str], body: Callable[[_T], Any]
) -> dict[str, Any]:
    """A page as it is sent; `more` says whether others follow."""
    return {
        "object": "list",
        "data": [body(item) for item in shown],
        "first_id": key(shown[0]) if shown else None,
        "last_id": key(shown[-1]) if shown else None,
        "has_more": more,
    }
