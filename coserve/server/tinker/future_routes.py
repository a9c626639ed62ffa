"""Answers, once they are there."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import CoserveError
from coserve.server.auth import USE
from coserve.server.context import Context
from coserve.server.http import Route, json_response, until_disconnect
from coserve.server.preparing import prepared
from coserve.server.tinker.futures import Future
from coserve.server.tinker.routes import PREFIX, PROTOBUF, read_fields

LONG_POLL = 20.0  # seconds that a request waits for its answer; the client gives up after 45


def routes(context: Context) -> list[Route]:
    """/api/v1/retrieve_future and cancel_future."""
    tinker = context.tinker

    async def retrieve(request: Request) -> Response:
        """A call's answer; 408 while there is none (ask again), 410 where it is forgotten (send the call
        again). A call that failed answers with `error` and whose fault it was (`category`)."""
        fields = await read_fields(
            request, frozenset({"request_id", "allow_metadata_only", "model_id"}), "retrieve_future"
        )
        future = tinker.futures.get(fields.required_string("request_id"), request.state.key)
        if not future.done.is_set():
            await until_disconnect(request, _wait(future))
        if not future.done.is_set():
            return _not_yet(future)
        tinker.futures.take(future)
        if future.answer is None:
            assert future.error is not None
            return _failed(future, future.error)
        answer = future.answer
        if answer.protobuf is not None and PROTOBUF in request.headers.get("accept", ""):
            return Response(await prepared(answer.protobuf, answer.size), media_type=PROTOBUF)
        return json_response(await prepared(answer.json, answer.size))

    async def _wait(future: Future) -> None:
        ends = [asyncio.create_task(event.wait()) for event in (future.done, context.lifecycle.stopped)]
        try:
            await asyncio.wait(ends, timeout=LONG_POLL, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()

    async def cancel(request: Request) -> Response:
        """Stop a sample that nobody waits for. What trains goes on: others stand behind it."""
        fields = await read_fields(request, frozenset({"request_id"}), "cancel_future")
        future = tinker.futures.get(fields.required_string("request_id"), request.state.key)
        if future.can_be_cancelled and not future.done.is_set():
            tinker.futures.cancel(future)
        return json_response({})

    return [
        Route("POST", PREFIX + "retrieve_future", retrieve, USE),
        Route("POST", PREFIX + "cancel_future", cancel, USE),
    ]


def _not_yet(future: Future) -> Response:
    body = {"type": "try_again", "request_id": future.request_id, "queue_state": future.queue_state}
    return json_response({**body, "queue_state_reason": future.reason or None}, 408)


def _failed(future: Future, error: CoserveError) -> Response:
    return json_response(
        {"error": error.message, "category": future.category, "code": error.code, "param": error.param}
    )
