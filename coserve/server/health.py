"""Is it alive, can it serve, which version, how does it do."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp

from coserve import __version__
from coserve.errors import PermissionDenied, Unavailable
from coserve.metrics import CONTENT_TYPE
from coserve.server.auth import METRICS, USE
from coserve.server.context import Context
from coserve.server.http import Route, error_response, json_response


async def _exposition(context: Context) -> Response:
    """Made in a thread: it takes milliseconds, which streams needn't wait for."""
    return Response(await asyncio.to_thread(context.metrics.render), media_type=CONTENT_TYPE)


def metrics_app(context: Context) -> ASGIApp:
    """The application of `--metrics-port`: /metrics alone, without keys."""

    async def metrics(request: Request) -> Response:
        return await _exposition(context)

    return Starlette(routes=[StarletteRoute("/metrics", metrics)])


def routes(context: Context) -> list[Route]:
    """Health, readiness, version and metrics."""

    async def health(request: Request) -> Response:
        """Alive: 200 as long as the server runs."""
        return Response(status_code=200)

    async def ready(request: Request) -> Response:
        """200 when a request sent now can be served, 503 while the engine starts or the server drains."""
        try:
            context.lifecycle.check_ready()
        except Unavailable as error:
            return error_response(error)
        return json_response({"status": "ready"})

    async def load(request: Request) -> Response:
        """vLLM's: the requests under way."""
        return json_response({"server_load": context.lifecycle.in_flight})

    async def version(request: Request) -> Response:
        """The server's version."""
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        """Prometheus' figures."""
        key = request.state.key
        if key is not None and key.models and key.role != METRICS:
            raise PermissionDenied("This API key doesn't see all models, and the metrics name all of them.")
        return await _exposition(context)

    return [
        Route("GET", "/health", health, USE),
        Route("GET", "/ready", ready, USE),
        Route("GET", "/ping", health, USE),
        Route("POST", "/ping", health, USE),
        Route("GET", "/version", version, USE),
        Route("GET", "/load", load, USE),
        Route("GET", "/metrics", metrics, METRICS),
    ]
