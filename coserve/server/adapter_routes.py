"""/v1/adapters: PEFT directories in and out as archives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from coserve.errors import InvalidRequest
from coserve.server.adapter_store import AdapterRow
from coserve.server.application.archives import tar_size
from coserve.server.application.files import MAX_UPLOAD_BYTES, UploadWriter, upload_limit
from coserve.server.auth import TUNE, Key
from coserve.server.context import Context
from coserve.server.http import Route, json_response
from coserve.server.multipart import receive_form
from coserve.server.openai.paging import list_body, query_limit

MOST_LISTED = 1_000_000


def adapter_body(row: AdapterRow, tier: str) -> dict[str, Any]:
    """An adapter version in the words of gRPC's `Adapter`."""
    version = row.version
    return {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "rank": version.rank,
        "status": version.status,
        "tier": tier,
        "job_id": version.job_id or None,
        "created_at": version.created_at,
        "pinned": version.pinned,
    }


def routes(context: Context) -> list[Route]:
    """Upload and download."""
    adapters = context.adapters

    def body_of(row: AdapterRow) -> dict[str, Any]:
        return adapter_body(row, adapters.tier(row.version.digest))

    async def take(given: Mapping[str, str], archive: Path, key: Key | None) -> AdapterRow:
        pinned = given.get("pinned")
        if pinned not in (None, "true", "false"):
            raise InvalidRequest("pinned must be true or false.", param="pinned")
        return await adapters.upload(
            given.get("name", ""),
            archive,
            MAX_UPLOAD_BYTES,
            key,
            pinned=None if pinned is None else pinned == "true",
            sha256=given.get("sha256", ""),
        )

    async def upload(request: Request) -> Response:
        """Take a PEFT directory as a tar or zip, in the body or a form's `file`, and publish it as the next
        version of `name`; that, and where they are given `pinned` and the archive's `sha256`, come in the
        query or the form."""
        folder, key = context.files.folder, request.state.key
        limit = upload_limit(key)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await receive_form(request, folder, limit)
            try:
                if form.path is None:
                    raise InvalidRequest("The form needs a part named file.", param="file")
                row = await take(form.fields, form.path, key)
            finally:
                form.discard()
        else:
            writer = UploadWriter(folder, limit)
            try:
                async for chunk in request.stream():
                    writer.write(chunk)
                row = await take(request.query_params, writer.close(), key)
            finally:
                writer.discard()
        return json_response(body_of(row))

    async def list_adapters(request: Request) -> Response:
        """Every version in service and where its weights are; with `limit` so many, `after` one
        ("NAME@VERSION")."""
        rows, limit = adapters.all_versions(request.state.key), query_limit(request, MOST_LISTED, MOST_LISTED)
        return json_response(list_body(request, rows, lambda row: row.version.full_name, body_of, limit))

    async def content(request: Request) -> Response:
        """A tar of a version's PEFT directory; its ETag is the version's digest."""
        row = adapters.get(request.path_params["name"], key=request.state.key)
        filename = quote(f"{row.version.name}-{row.version.version}.tar")
        headers = {"etag": f'"{row.version.digest}"', "cache-control": "private, no-cache"}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        headers["content-disposition"] = f"attachment; filename*=utf-8''{filename}"
        headers["content-length"] = str(tar_size(Path(row.version.path)))
        return StreamingResponse(adapters.archive(row), media_type="application/x-tar", headers=headers)

    return [
        Route("POST", "/v1/adapters", upload, TUNE),
        Route("GET", "/v1/adapters", list_adapters, TUNE),
        Route("GET", "/v1/adapters/{name}/content", content, TUNE),
    ]
