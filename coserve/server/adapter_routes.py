"""/v1/adapters: PEFT directories in and out as archives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from coserve.errors import InvalidRequest
from coserve.server.adapter_store import AdapterRow
from coserve.server.application.archives import tar_chunks
from coserve.server.application.files import MAX_UPLOAD_BYTES, UploadWriter, upload_limit
from coserve.server.auth import TUNE
from coserve.server.context import Context
from coserve.server.http import Route, json_response
from coserve.server.multipart import receive_form


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
    }


async def archive_chunks(directory: Path) -> AsyncIterator[bytes]:
    """A tar of a PEFT directory, read in a thread."""
    chunks = tar_chunks(directory)
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk


def routes(context: Context) -> list[Route]:
    """Upload and download."""
    adapters = context.adapters

    async def upload(request: Request) -> Response:
        """Take a PEFT directory as a tar or zip and publish it as the next version of `name`."""
        folder, key = context.files.folder, request.state.key
        limit = upload_limit(key)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await receive_form(request, folder, limit)
            try:
                name = form.fields.get("name", "")
                if form.path is None:
                    raise InvalidRequest("The form needs a part named file.", param="file")
                row = await adapters.upload(name, form.path, MAX_UPLOAD_BYTES, key)
            finally:
                form.discard()
        else:
            writer = UploadWriter(folder, limit)
            try:
                async for chunk in request.stream():
                    writer.write(chunk)
                name = request.query_params.get("name", "")
                row = await adapters.upload(name, writer.close(), MAX_UPLOAD_BYTES, key)
            finally:
                writer.discard()
        return json_response(adapter_body(row, adapters.tier(row.version.digest)))

    async def list_adapters(request: Request) -> Response:
        """Every version of every adapter, and where its weights are."""
        rows = adapters.all_versions(request.state.key)
        data = [adapter_body(row, adapters.tier(row.version.digest)) for row in rows]
        return json_response({"object": "list", "data": data})

    async def content(request: Request) -> Response:
        """A version as a tar of its PEFT directory."""
        row = adapters.get(request.path_params["name"], key=request.state.key)
        filename = quote(f"{row.version.name}-{row.version.version}.tar")
        return StreamingResponse(
            archive_chunks(Path(row.version.path)),
            media_type="application/x-tar",
            headers={"content-disposition": f"attachment; filename*=utf-8''{filename}"},
        )

    return [
        Route("POST", "/v1/adapters", upload, TUNE),
        Route("GET", "/v1/adapters", list_adapters, TUNE),
        Route("GET", "/v1/adapters/{name}/content", content, TUNE),
    ]
