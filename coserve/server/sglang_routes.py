"""SGLang's routes for adapters at run time.

Their answers are in its form, and refusals in OpenAI's envelope as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import CoserveError
from coserve.server.auth import TUNE
from coserve.server.context import Context
from coserve.server.errors import envelope, http_headers, http_status
from coserve.server.fields import Fields
from coserve.server.http import Route, json_response, read_json


def routes(context: Context) -> list[Route]:
    """Loading and unloading by name, as SGLang has them without `/v1`."""
    adapters = context.adapters

    async def answer(request: Request, change: Callable[[Fields], Awaitable[object]]) -> Response:
        fields, failure = await read_json(request), None
        try:
            await change(fields)
        except CoserveError as error:
            failure = error
        loaded = {row.version.name: row.root for row in adapters.newest(request.state.key)}
        body = {"success": failure is None, "error_message": failure.message if failure else ""}
        body |= {"loaded_adapters": loaded}
        if failure is None:
            return json_response(body)
        status, _ = http_status(failure)
        return json_response(body | envelope(failure), status, http_headers(failure))

    async def load(request: Request) -> Response:
        """Load an adapter from a directory under an `--adapter-root`, as SGLang does: `lora_name`,
        `lora_path`, `pinned`; the answer lists the adapters in service."""

        async def change(fields: Fields) -> None:
            await adapters.load(
                fields.required_string("lora_name"),
                fields.required_string("lora_path"),
                pinned=fields.boolean("pinned"),
                replace_existing=False,
                key=request.state.key,
            )

        return await answer(request, change)

    async def unload(request: Request) -> Response:
        """Take an adapter out of service, as SGLang does; the answer lists those that stay."""
        return await answer(
            request, lambda fields: adapters.unload(fields.required_string("lora_name"), request.state.key)
        )

    return [
        Route("POST", "/load_lora_adapter", load, TUNE),
        Route("POST", "/unload_lora_adapter", unload, TUNE),
    ]
