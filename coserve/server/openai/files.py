"""/v1/files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from coserve.errors import InvalidRequest
from coserve.server.application.files import keep_seconds, upload_limit
from coserve.server.auth import TUNE, tenant_of
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.file_store import FileRow
from coserve.server.http import Route, json_response
from coserve.server.multipart import receive_form
from coserve.server.openai.paging import list_body, newest_first, query_limit


def file_body(file: FileRow) -> dict[str, Any]:
    """OpenAI's file object."""
    expiry = {"expires_at": file.expires_at} if file.expires_at is not None else {}
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        **expiry,
    }


def form_object(fields: Mapping[str, str], name: str) -> Fields | None:
    """A form's fields `name[key]` as an object; whole numbers are numbers."""
    parts = {key[len(name) + 1 : -1]: value for key, value in fields.items() if key.startswith(f"{name}[")}
    if not parts:
        return None
    return Fields(
        {key: int(value) if value.isascii() and value.isdecimal() else value for key, value in parts.items()},
        f"{name}.",
    )


def routes(context: Context) -> list[Route]:
    """This resource's routes."""
    files = context.files

    async def upload(request: Request) -> Response:
        """Take a file as a form: `file`, `purpose`, `expires_after`."""
        form = await receive_form(request, files.folder, upload_limit(request.state.key))
        try:
            if form.path is None or form.filename is None:
                raise InvalidRequest("The form needs a part named file.", param="file")
            keep = keep_seconds(form_object(form.fields, "expires_after"))
            purpose, tenant = form.fields.get("purpose"), tenant_of(request.state.key)
            added = await files.add(form.path, form.filename, purpose, tenant, keep)
            return json_response(file_body(added))
        finally:
            form.discard()

    async def list_files(request: Request) -> Response:
        """Files, of a `purpose` where one is given."""
        purpose, key = request.query_params.get("purpose"), request.state.key
        found = await files.list(purpose, newest_first(request), key)
        limit = query_limit(request, 10000, 10000)
        return json_response(list_body(request, found, lambda file: file.id, file_body, limit))

    async def get_file(request: Request) -> Response:
        """One file."""
        return json_response(file_body(await files.get(request.path_params["id"], request.state.key)))

    async def content(request: Request) -> Response:
        """A file's bytes."""
        file = await files.get(request.path_params["id"], request.state.key)
        disposition = f"attachment; filename*=utf-8''{quote(file.filename)}"
        return FileResponse(
            files.path(file.id),
            media_type="application/octet-stream",
            headers={"content-disposition": disposition},
        )

    async def delete(request: Request) -> Response:
        """Delete a file; jobs that were prepared from it go on."""
        file_id = request.path_params["id"]
        await files.delete(file_id, request.state.key)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return [
        Route("POST", "/v1/files", upload, TUNE),
        Route("GET", "/v1/files", list_files, TUNE),
        Route("GET", "/v1/files/{id}", get_file, TUNE),
        Route("GET", "/v1/files/{id}/content", content, TUNE),
        Route("DELETE", "/v1/files/{id}", delete, TUNE),
    ]
