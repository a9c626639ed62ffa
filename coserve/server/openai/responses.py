"""/v1/responses: OpenAI's newer form of a chat request, for text and functions.

A response is a chat answer told as items. It may go on from a kept one; nothing runs in the background.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coserve.errors import ContextLengthExceeded, CoserveError, InvalidRequest
from coserve.server.application.chat_answer import AnswerDelta
from coserve.server.application.response_input import read_input, renamed
from coserve.server.application.response_store import ResponseStore, StoredResponse
from coserve.server.auth import USE, Key, tenant_of
from coserve.server.context import Context
from coserve.server.errors import told
from coserve.server.fields import Fields
from coserve.server.http import (
    EventStream,
    Route,
    json_response,
    logger,
    read_json,
    take_request_id,
    until_disconnect,
)
from coserve.server.openai.chat_completions import ChatCompletion
from coserve.server.openai.logprobs import chat_logprobs
from coserve.server.openai.paging import list_body, newest_first, query_limit
from coserve.server.openai.response_items import Event, ResponseItems
from coserve.server.openai.usage import StreamOptions, padded
from coserve.server.preparing import prepared

_ECHOED = ("user", "safety_identifier", "prompt_cache_key", "max_output_tokens", "max_tool_calls")


class _NamedEvents(EventStream):
    """Events with their names, and no [DONE]: the last one says how it ended."""

    end = b""

    @staticmethod
    def frame(event: Any) -> bytes:
        return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class _Response:
    """One response: what it is asked with, and its forms."""

    def __init__(
        self, context: Context, store: ResponseStore, fields: Fields, key: Key | None, request_id: str
    ) -> None:
        self._fields = fields
        self._store = store
        self._tenant = tenant_of(key)
        self.metadata = fields.metadata()
        self.stream = fields.boolean("stream")
        self._obfuscates = StreamOptions.read(fields, force_usage=False).obfuscates
        self.previous = fields.string("previous_response_id")
        history = store.before(self.previous, self._tenant)
        self.input = read_input(fields)
        self._history = history
        self._make = lambda body: ChatCompletion(context, Fields(body), key, request_id)
        try:
            self.chat = self._fitting()
        except CoserveError as error:
            raise renamed(error) from None
        wants_logprobs = self.chat.top_logprobs is not None
        self._items = ResponseItems(self._logprobs if wants_logprobs else None)
        self.id = f"resp_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._sequence = 0

    def _fitting(self) -> ChatCompletion:
        """The chat request; with `truncation` auto without as many of the oldest messages as is needed."""
        try:
            return self._make(self.input.chat_body(self._history))
        except ContextLengthExceeded:
            cuts = self.input.cuts(self._history)
            if self._fields.raw("truncation") != "auto" or not cuts:
                raise
        found = self._make(self.input.chat_body(self._history, cuts.pop()))  # the last message, or its error
        while cuts:
            place = len(cuts) // 2
            try:
                found = self._make(self.input.chat_body(self._history, cuts[place]))
                cuts = cuts[:place]
            except ContextLengthExceeded:
                cuts = cuts[place + 1 :]
        return found

    def _logprobs(self, logprobs: Any) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(self.chat.names, logprobs)["content"]
        return entries

    async def _deltas(self) -> AsyncIterator[AnswerDelta]:
        try:
            async with aclosing(self.chat.answers.deltas()) as deltas:
                async for delta in deltas:
                    yield delta
        except CoserveError as error:
            raise renamed(error) from None

    # ------------------------------------------------------------------ whole

    async def body(self) -> dict[str, Any]:
        status = "failed"
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                self._items.take(delta)
                status = _status(delta.finish_reason) or status
        return self._finished(status)

    def _finished(self, status: str) -> dict[str, Any]:
        """The body of a response that has ended, which is kept now unless that is not wanted."""
        body = self._body(status)
        if self._fields.boolean("store", True):
            messages = [*self._history, *self.input.messages, *self._items.messages()]
            self._store.keep(StoredResponse(body, self.input.items, messages, self._tenant))
        return body

    def _body(self, status: str, error: CoserveError | None = None) -> dict[str, Any]:
        fields, sampling = self._fields, self.chat.generation.request.sampling
        is_over = status not in ("in_progress", "failed")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": fields.raw("instructions"),
            "model": self.chat.target.name,
            "output": list(self._items.output),
            "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
            "previous_response_id": self.previous,
            "reasoning": fields.raw("reasoning") or {"effort": None, "summary": None},
            "service_tier": self.chat.service.latency_class.name,
            "store": fields.boolean("store", True),
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **(fields.raw("text") or {})},
            "tool_choice": fields.raw("tool_choice") or "auto",
            "tools": [{"strict": None, "parameters": None, **tool} for tool in fields.raw("tools") or []],
            "top_logprobs": sampling.logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": fields.raw("truncation") or "disabled",
            "background": False,
            "usage": self._usage() if is_over else None,
            "metadata": self.metadata,
            **{name: fields.raw(name) for name in _ECHOED},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.chat.generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }

    # ------------------------------------------------------------------ streamed

    async def events(self) -> AsyncIterator[list[Event]]:
        """Events, those of one delta together. What fails after the first is told by response.failed."""
        started, status = False, "failed"
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    events = self._items.take(delta)
                    if not started:
                        body = {**self._body("in_progress"), "output": []}
                        begin = ("response.created", "response.in_progress")
                        events = [*({"type": kind, "response": body} for kind in begin), *events]
                        started = True
                    status = _status(delta.finish_reason) or status
                    yield self._numbered(events)
            last = {"type": f"response.{status}", "response": self._finished(status)}
        except Exception as error:
            if not started:
                raise
            failure = told(error, logger, "unexpected error in a stream")
            last = {"type": "response.failed", "response": self._body("failed", failure)}
        yield self._numbered([last])

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self._sequence
            self._sequence += 1
            if self._obfuscates and event["type"].endswith(".delta"):
                padded(event)
        return events


def _status(finish_reason: str | None) -> str | None:
    if finish_reason is None:
        return None
    return "incomplete" if finish_reason == "length" else "completed"


def routes(context: Context) -> list[Route]:
    """This resource's routes."""
    store = ResponseStore()

    async def create(request: Request) -> Response:
        """Answer an input; the answer is kept unless `store` is false."""
        fields, state = await read_json(request), request.state
        take_request_id(request, fields)
        make = partial(_Response, context, store, fields, state.key, state.request_id)
        response = await prepared(make, state.size)
        if response.stream:
            return await _NamedEvents.open(
                request, response.events(), context.config.sse_keep_alive_interval
            )
        return json_response(await until_disconnect(request, response.body()))

    async def count(request: Request) -> Response:
        """How many tokens an input has, templated, without answering it."""
        fields, state = await read_json(request), request.state
        make = partial(_Response, context, store, fields, state.key, state.request_id)
        response = await prepared(make, state.size)
        tokens = len(response.chat.generation.prompts[0])
        return json_response({"object": "response.input_tokens", "input_tokens": tokens})

    return [
        Route("POST", "/v1/responses", create, USE),
        Route("POST", "/v1/responses/input_tokens", count, USE),
        *_kept_routes(store),
    ]


def _kept_routes(store: ResponseStore) -> list[Route]:
    """Responses that were kept."""

    async def get(request: Request) -> Response:
        """A kept response."""
        if request.query_params.get("stream") == "true":
            raise InvalidRequest(
                "stream is not supported: responses are kept once they are whole.", param="stream"
            )
        return json_response(store.get(request.path_params["id"], tenant_of(request.state.key)).body)

    async def delete(request: Request) -> Response:
        """Forget a kept response."""
        name = request.path_params["id"]
        store.delete(name, tenant_of(request.state.key))
        return json_response({"id": name, "object": "response", "deleted": True})

    async def cancel(request: Request) -> Response:
        """Refused: only what runs in the background can be cancelled; close the connection instead."""
        store.get(request.path_params["id"], tenant_of(request.state.key))
        raise InvalidRequest(
            "Only a response in the background can be cancelled, and this server runs none there.", param="id"
        )

    async def input_items(request: Request) -> Response:
        """The items that a kept response was asked with, the last first."""
        items = store.get(request.path_params["id"], tenant_of(request.state.key)).items
        if newest_first(request):
            items = items[::-1]
        return json_response(
            list_body(
                request, items, lambda item: item["id"], lambda item: item, query_limit(request, 20, 100)
            )
        )

    return [
        Route("GET", "/v1/responses/{id}", get, USE),
        Route("DELETE", "/v1/responses/{id}", delete, USE),
        Route("POST", "/v1/responses/{id}/cancel", cancel, USE),
        Route("GET", "/v1/responses/{id}/input_items", input_items, USE),
    ]
