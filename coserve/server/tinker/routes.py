"""The parts of /api/v1, and what their routes share."""

from __future__ import annotations

import hashlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coserve.server.fields import Fields
from coserve.server.http import json_response, read_json
from coserve.server.tinker.futures import Future

PREFIX = "/api/v1/"
PROTOBUF = "application/x-protobuf"


async def read_fields(request: Request, allowed: frozenset[str], type_name: str) -> Fields:
    """The body, which may hold these fields and a `type` that names the request."""
    fields = await read_json(request)
    check_fields(fields, allowed, type_name)
    return fields


def check_fields(fields: Fields, allowed: frozenset[str], type_name: str) -> None:
    """Refuse other fields, and a `type` of another request."""
    fields.only(allowed | {"type"}, "a request to " + type_name)
    fields.choice("type", (type_name,))


def digest_of(fields: Fields) -> bytes:
    """The same for the same body."""
    return hashlib.sha256(msgspec.json.encode(fields.body, order="sorted")).digest()


def future_response(future: Future, model_id: str | None = None) -> Response:
    """The id to ask for the answer by."""
    return json_response({"request_id": future.request_id, "model_id": model_id})
