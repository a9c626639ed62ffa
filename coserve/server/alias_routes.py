"""/v1/aliases: names that mean a model until they are moved."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.server.alias_store import Alias
from coserve.server.auth import TUNE, USE
from coserve.server.context import Context
from coserve.server.http import Route, json_response, read_json


def alias_body(alias: Alias) -> dict[str, Any]:
    """An alias as JSON, in the words of gRPC's `Alias`."""
    return {"object": "alias", "alias": alias.name, "model": alias.model, "created_at": alias.created_at}


def routes(context: Context) -> list[Route]:
    """Set, list and delete."""
    aliases = context.aliases

    async def list_aliases(request: Request) -> Response:
        """Every alias."""
        data = [alias_body(alias) for alias in aliases.all(request.state.key)]
        return json_response({"object": "list", "data": data})

    async def get_alias(request: Request) -> Response:
        """What one alias means."""
        return json_response(alias_body(aliases.get(request.path_params["alias"], request.state.key)))

    async def set_alias(request: Request) -> Response:
        """Make an alias, or move it: `{"model": "support@3"}`."""
        fields = await read_json(request)
        fields.only(frozenset({"model"}), "an alias")
        name, model = request.path_params["alias"], fields.required_string("model")
        alias = await aliases.set(name, model, request.state.key)
        return json_response(alias_body(alias))

    async def delete_alias(request: Request) -> Response:
        """Forget an alias; the model it meant stays."""
        name = request.path_params["alias"]
        await aliases.delete(name, request.state.key)
        return json_response({"object": "alias", "alias": name, "deleted": True})

    return [
        Route("GET", "/v1/aliases", list_aliases, USE),
        Route("GET", "/v1/aliases/{alias}", get_alias, USE),
        Route("PUT", "/v1/aliases/{alias}", set_alias, TUNE),
        Route("DELETE", "/v1/aliases/{alias}", delete_alias, TUNE),
    ]
