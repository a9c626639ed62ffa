"""The HTTP application: request ids, keys, draining, routing, and errors in OpenAI's envelope."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from types import ModuleType

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve import errors
from coserve.log import line
from coserve.rpc_metrics import NO_ROUTE
from coserve.server import adapter_routes, alias_routes, health, sglang_routes, vllm_routes
from coserve.server.auth import Authenticator
from coserve.server.context import Context
from coserve.server.cors import Cors
from coserve.server.http import BodyMemory, Route, error_response, gone_response, logger, request_id
from coserve.server.openai import (
    chat_completions,
    completions,
    files,
    fine_tuning,
    left_out,
    models,
    responses,
    uploads,
)
from coserve.server.tinker import future_routes, run_routes, sampling_routes, service_routes, training_routes
from coserve.server.tinker.routes import PREFIX as TINKER_PREFIX

OPEN_PATHS = frozenset({"/health", "/ready"})
_WHILE_DRAINING = OPEN_PATHS | {"/ping", "/metrics", "/version"}
_LOGGED = 200  # characters of a path


class Gate:
    """Outermost layer: gives every request its id, checks its key, refuses work while draining."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context
        self._cors = Cors(context.config.allowed_origins)
        self._bodies = BodyMemory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        state["request_id"] = request_id(given)  # a body may change it
        state["body_memory"] = body = self._bodies.share()
        started = time.monotonic()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.release()  # it has been read into what it asks for
                added = {
                    "x-request-id": state["request_id"],
                    "x-content-type-options": "nosniff",
                    **self._context.quotas.headers(state.get("key")),
                    **self._cors.headers(headers),
                }
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode("latin-1"), value.encode("latin-1")) for name, value in added.items()),
                ]
            await send(message)

        path, method = scope["path"], scope["method"]
        preflight = self._cors.preflight(method, headers)
        if preflight is not None:
            await preflight(scope, receive, send_named)
            return
        try:
            try:
                credential = _credential(path, headers)
                state["key"] = None if path in OPEN_PATHS else self._context.auth.key(credential)
                if path not in _WHILE_DRAINING:
                    if state["key"] is None:
                        self._cors.check_page(method, headers)
                    self._context.lifecycle.check_open()
                    self._context.quotas.arrival(state["key"])
            except errors.CoserveError as error:
                self._context.metrics.rejected(error.code)
                response = error_response(error)
                if isinstance(error, errors.Unauthenticated):
                    response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        finally:
            body.release()
            if path not in _WHILE_DRAINING:
                seconds = time.monotonic() - started
                self._context.metrics.rpc.http(method, state.get("route", NO_ROUTE), status, seconds)
                named = {"id": state["request_id"], "method": method, "path": path[:_LOGGED]}
                logger.info(line("http", **named, status=status, seconds=seconds))


def _credential(path: str, headers: dict[bytes, bytes]) -> str | None:
    """The `Authorization` of a request; Tinker's client sends its key in a header of its own."""
    given = headers.get(b"authorization")
    if given is None and path.startswith(TINKER_PREFIX) and b"x-api-key" in headers:
        given = b"Bearer " + headers[b"x-api-key"]
    return given.decode("latin-1") if given is not None else None


def _endpoint(route: Route, context: Context) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            Authenticator.require(request.state.key, route.right)
            return await route.handler(request)
        except ClientDisconnect:
            return gone_response()
        except errors.CoserveError as error:
            context.metrics.rejected(error.code)
            return error_response(error)

    return endpoint


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:200]
    if error.status_code == 404:
        return error_response(errors.NotFound(f"There is no route {method} {path}."))
    if error.status_code == 405:
        response = error_response(errors.MethodNotAllowed(f"{path} does not take {method}."))
        if error.headers and "Allow" in error.headers:
            response.headers["allow"] = error.headers["Allow"]
        return response
    return error_response(errors.InvalidRequest(str(error.detail)))


def route_parts() -> tuple[ModuleType, ...]:
    """The modules that have routes, each with a function `routes`."""
    openai = (chat_completions, completions, responses, models, files, uploads, fine_tuning, left_out)
    tinker = (service_routes, training_routes, sampling_routes, future_routes, run_routes)
    return (health, *openai, *tinker, vllm_routes, sglang_routes, adapter_routes, alias_routes)


def all_routes(context: Context) -> list[Route]:
    """Every route of the server."""
    return [route for part in route_parts() for route in part.routes(context)]


def create_app(context: Context) -> ASGIApp:
    """The ASGI application of a server."""
    routes = []
    by_path: dict[str, list[Route]] = {}
    for route in all_routes(context):
        by_path.setdefault(route.path, []).append(route)
    for path, group in by_path.items():
        handlers = {route.method: _endpoint(route, context) for route in group}
        routes.append(StarletteRoute(path, _by_method(path, handlers), methods=list(handlers)))
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _http_error},
        middleware=[Middleware(_Faults)],
    )
    app.router.redirect_slashes = False
    return Gate(app, context)


def _by_method(
    path: str,
    handlers: dict[str, Callable[[Request], Awaitable[Response]]],
) -> Callable[[Request], Awaitable[Response]]:
    async def dispatch(request: Request) -> Response:
        request.state.route = path
        method = "GET" if request.method == "HEAD" and "HEAD" not in handlers else request.method
        return await handlers[method](request)

    return dispatch


class _Faults:
    """Turns a fault of ours before the first byte into a 500 envelope; its traceback goes to the log once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            response = error_response(error)
            if not started:
                await response(scope, receive, send)
