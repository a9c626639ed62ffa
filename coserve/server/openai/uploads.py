"""/v1/uploads: files too large for one request."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import InvalidRequest
from coserve.server.application.uploads import MAX_PART_BYTES
from coserve.server.auth import TUNE
from coserve.server.context import Context
from coserve.server.file_store import FileRow
from coserve.server.http import Route, json_response, read_json
from coserve.server.multipart import receive_form
from coserve.server.openai.files import file_body
from coserve.server.upload_store import UploadRow

_COMPLETE_FIELDS = frozenset({"part_ids", "md5"})


def upload_body(upload: UploadRow, file: FileRow | None = None) -> dict[str, Any]:
    """OpenAI's upload object."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file_body(file) if file is not None else None,
    }


def routes(context: Context) -> list[Route]:
    """This resource's routes."""
    uploads = context.uploads

    async def create(request: Request) -> Response:
        """Announce a file that comes in parts: up to 8 GB."""
        return json_response(upload_body(await uploads.create(await read_json(request), request.state.key)))

    async def add_part(request: Request) -> Response:
        """Take a part."""
        form = await receive_form(request, uploads.folder, MAX_PART_BYTES, "data")
        try:
            if form.path is None:
                raise InvalidRequest("The form needs a part named data.", param="data")
            part = await uploads.add_part(request.path_params["id"], form.path, request.state.key)
        finally:
            form.discard()
        return json_response(
            {
                "id": part.id,
                "object": "upload.part",
                "created_at": part.created_at,
                "upload_id": part.upload_id,
            }
        )

    async def complete(request: Request) -> Response:
        """Put the parts together, in the order given, to a file."""
        fields = await read_json(request)
        fields.only(_COMPLETE_FIELDS, "the request")
        names = fields.strings("part_ids")
        if not names:
            raise fields.fail("part_ids", "must name the parts in their order.")
        name, md5 = request.path_params["id"], fields.string("md5") or ""
        upload, file = await uploads.complete(name, names, md5, request.state.key)
        return json_response(upload_body(upload, file))

    async def cancel(request: Request) -> Response:
        """Forget an upload and its parts."""
        return json_response(upload_body(await uploads.cancel(request.path_params["id"], request.state.key)))

    root = "/v1/uploads"
    return [
        Route("POST", root, create, TUNE),
        Route("POST", root + "/{id}/parts", add_part, TUNE),
        Route("POST", root + "/{id}/complete", complete, TUNE),
        Route("POST", root + "/{id}/cancel", cancel, TUNE),
    ]
