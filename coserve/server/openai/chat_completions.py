"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Piece, Reasoning
from coserve.server.application.chat import Conversation, read_conversation
from coserve.server.application.chat_answer import Answer, AnswerDelta, ChatAnswers, ToolCall
from coserve.server.application.generation import Generation
from coserve.server.application.request_fields import KNOWN_CHAT
from coserve.server.application.sampling import (
    log_unknown,
    parse_sampling,
    read_logprobs,
    read_prompt_logprobs,
    refuse_unsupported,
)
from coserve.server.auth import USE, Key
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.http import (
    EventStream,
    Route,
    json_response,
    read_json,
    take_request_id,
    until_disconnect,
)
from coserve.server.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from coserve.server.openai.usage import StreamOptions, usage_body
from coserve.server.preparing import prepared


class ChatCompletion:
    """What one chat request wants in its answer, and the forms of that answer."""

    def __init__(self, context: Context, fields: Fields, key: Key | None, request_id: str) -> None:
        refuse_unsupported(fields)
        log_unknown(fields, KNOWN_CHAT)
        self.context = context
        self.options = StreamOptions.read(fields, force_usage=context.config.force_include_usage)
        wants = fields.boolean("logprobs")
        top = read_logprobs(fields, "top_logprobs", context.rules)
        if top is not None and not wants:
            raise fields.fail("top_logprobs", "needs logprobs: true.")
        self.top_logprobs = (top or 0) if wants else None
        self.return_token_ids = fields.boolean("return_token_ids")
        self.names = TokenNames(context.tokenizer, fields.boolean("return_tokens_as_token_ids"))
        self.echo = fields.boolean("echo")
        self.service = context.tiers.read(fields, key)
        self.target = context.adapters.resolve(fields.string("model"), key)
        self.conversation: Conversation = read_conversation(fields, context.chat)
        request = parse_sampling(
            fields,
            context.rules,
            logprobs=self.top_logprobs,
            default_max_tokens=None,
            prompt_logprobs=read_prompt_logprobs(fields, context.rules, self.options.stream),
        )
        self.generation: Generation = context.generator.prepare(
            self.target,
            self.conversation.sampling(request),
            self.service,
            [self.conversation.token_ids],
            request_id,
        )
        self.answers = ChatAnswers(self.generation, self.conversation.form)
        self.id = f"chatcmpl-{request_id}"
        self.created = int(time.time())

    @property
    def echoed(self) -> str:
        return self.conversation.continued if self.echo else ""

    # ------------------------------------------------------------------ whole

    async def body(self) -> dict[str, Any]:
        answers = await self.answers.answers()
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.target.name,
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage_body(self.generation.usage),
            "service_tier": self.service.latency_class.name,
            "system_fingerprint": self.generation.fingerprint,
            "prompt_logprobs": prompt_logprobs(self.context.tokenizer, answers[0].prompt_logprobs),
        }
        if self.return_token_ids:
            body["prompt_token_ids"] = self.generation.prompts[0]
        return body

    def _choice(self, answer: Answer) -> dict[str, Any]:
        content = self.echoed + answer.content
        message: dict[str, Any] = {"role": self.conversation.role, "content": content, "refusal": None}
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.calls:
            message["content"] = content or None
            message["tool_calls"] = [_call_body(call) for call in answer.calls]
        body: dict[str, Any] = {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.return_token_ids:
            body["token_ids"] = answer.token_ids
        return body

    def _logprobs(self, logprobs: Any) -> dict[str, Any] | None:
        if self.top_logprobs is None:
            return None
        return chat_logprobs(self.names, logprobs)

    # ------------------------------------------------------------------ streamed

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Chunks, those of one delta together: role, content or tool calls, one finish chunk a choice, then
        usage when asked for."""
        started: set[int] = set()
        async with aclosing(self.answers.deltas()) as deltas:
            async for delta in deltas:
                chunks = []
                if delta.index not in started:
                    started.add(delta.index)
                    chunks.append(self._chunk(delta.index, {"role": self.conversation.role, "content": ""}))
                    if self.return_token_ids:
                        chunks[0]["prompt_token_ids"] = self.generation.prompts[0]
                    if self.echoed:
                        chunks.append(self._chunk(delta.index, {"content": self.echoed}))
                chunks += self._pieces(delta)
                if chunks:
                    yield self.options.ready(chunks)
        if self.options.include_usage:
            yield [self.options.last({**self._head(), "choices": []}, self.generation.usage)]

    def _pieces(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        chunks = [self._chunk(delta.index, _message_delta(piece)) for piece in delta.pieces]
        if delta.token_ids and (self.top_logprobs is not None or self.return_token_ids):
            if not chunks:
                chunks.append(self._chunk(delta.index, {"content": ""}))
            self._add_tokens(chunks[0]["choices"][0], delta)
        if delta.finish_reason is not None:
            chunk = self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
            chunk["choices"][0]["stop_reason"] = delta.stop_reason
            chunks.append(chunk)
        return chunks

    def _add_tokens(self, choice: dict[str, Any], delta: AnswerDelta) -> None:
        choice["logprobs"] = self._logprobs(delta.logprobs)
        if self.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.target.name,
            "service_tier": self.service.latency_class.name,
            "system_fingerprint": self.generation.fingerprint,
        }

    def _chunk(self, index: int, message: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": message, "logprobs": None, "finish_reason": finish_reason}
        return self.options.add_usage({**self._head(), "choices": [choice]}, self.generation.usage)


def _reasoning(text: str) -> dict[str, str]:
    """Under vLLM's name for it and under the older one, which most clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _call_body(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message_delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case CallOpened(index, id, name):
            opening = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": opening}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def routes(context: Context) -> list[Route]:
    """This resource's routes."""

    async def create(request: Request) -> Response:
        """Answer a conversation, whole or as a stream."""
        fields, state = await read_json(request), request.state
        take_request_id(request, fields)
        make = partial(ChatCompletion, context, fields, state.key, state.request_id)
        answer = await prepared(make, state.size)
        if answer.options.stream:
            return await EventStream.open(
                request, answer.events(), context.config.sse_keep_alive_interval
            )
        return json_response(await until_disconnect(request, answer.body()))

    return [Route("POST", "/v1/chat/completions", create, USE)]
