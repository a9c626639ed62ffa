"""/v1/models: the base and every adapter."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.server.adapter_store import AdapterRow
from coserve.server.application.models import BaseModel
from coserve.server.auth import TUNE, USE, Key, sees
from coserve.server.context import Context
from coserve.server.http import Route, json_response


def base_card(base: BaseModel, name: str = "") -> dict[str, Any]:
    """The base model's entry, under its first name or another one."""
    return {
        "id": name or base.name,
        "object": "model",
        "created": base.created,
        "owned_by": "coserve",
        "root": base.root,
        "parent": None,
        "max_model_len": base.max_model_len,
        "permission": [],
    }


def adapter_card(base: BaseModel, row: AdapterRow, name: str | None = None) -> dict[str, Any]:
    """An adapter's entry: its newest version under its name."""
    version = row.version
    return {
        "id": name or version.name,
        "object": "model",
        "created": version.created_at,
        "owned_by": "coserve",
        "root": row.root,
        "parent": base.name,
        "max_model_len": base.max_model_len,
        "version": version.version,
        "digest": version.digest,
        "permission": [],
    }


def routes(context: Context) -> list[Route]:
    """This resource's routes."""

    def card_of(name: str, key: Key | None) -> dict[str, Any]:
        alias = context.adapters.aliases.get(name)
        if alias is not None and context.adapters.sees_alias(alias, key):
            return {**card_of(alias.model, key), "id": name, "alias_of": alias.model}
        if context.adapters.is_base(name) and context.adapters.sees_model(name, key):
            return base_card(context.base, name)
        return adapter_card(context.base, context.adapters.get(name, key=key), name)

    async def list_models(request: Request) -> Response:
        """The base under each of its names, the newest version of every adapter, and aliases."""
        key = request.state.key
        names = context.base.names if sees(key, context.base.name) else ()
        cards = [base_card(context.base, name) for name in names]
        cards += [adapter_card(context.base, row) for row in context.adapters.newest(key)]
        cards += [card_of(alias.name, key) for alias in context.aliases.all(key)]
        return json_response({"object": "list", "data": cards})

    async def get_model(request: Request) -> Response:
        """One of them; `name@3` is one version of an adapter."""
        return json_response(card_of(request.path_params["id"], request.state.key))

    async def delete_model(request: Request) -> Response:
        """Delete an adapter (`name@3`: one version) with its files, or an alias."""
        name, key = request.path_params["id"], request.state.key
        alias = context.adapters.aliases.get(name)
        if alias is not None and context.adapters.sees_alias(alias, key):
            await context.aliases.delete(name, key)
        else:
            await context.adapters.delete(name, key)
        return json_response({"id": name, "object": "model", "deleted": True})

    return [
        Route("GET", "/v1/models", list_models, USE),
        Route("GET", "/v1/models/{id:path}", get_model, USE),
        Route("DELETE", "/v1/models/{id:path}", delete_model, TUNE),
    ]
