"""Client-streamed uploads: `info` first, then `data`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from coserve.errors import InvalidRequest
from coserve.server.application.files import UploadWriter


async def receive(requests: AsyncIterator[Any], writer: UploadWriter) -> Any:
    """Write all `data` parts to `writer` and return `info`; InvalidRequest when the order is another."""
    info = None
    async for request in requests:
        part = request.WhichOneof("part")
        if info is None:
            if part != "info":
                raise InvalidRequest("The first message of an upload must hold info.", param="info")
            info = request.info
        elif part == "data":
            writer.write(request.data)
        else:
            raise InvalidRequest("Every message after the first must hold data.", param="data")
    if info is None:
        raise InvalidRequest("The upload is empty: send info first, then data.", param="info")
    writer.close()
    return info
