"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coserve.engine.messages import TokenLogprobs
from coserve.errors import InvalidRequest
from coserve.server.application.generation import Choice, Generation
from coserve.server.application.request_fields import KNOWN_COMPLETIONS
from coserve.server.application.sample_text import Delta
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
from coserve.server.openai.logprobs import (
    TokenNames,
    completion_logprobs,
    prompt_logprobs,
    text_length,
    trimmed,
)
from coserve.server.openai.usage import StreamOptions, usage_body
from coserve.server.preparing import prepared
from coserve.tokenizer import Tokenizer

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


def read_prompts(fields: Fields, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt: a string, strings, ids, or lists of ids."""
    raw = fields.raw("prompt")
    special = fields.boolean("add_special_tokens", True)
    if isinstance(raw, str):
        return [tokenizer.encode(raw, add_special_tokens=special)]
    if not isinstance(raw, list) or not raw:
        raise fields.fail(
            "prompt", "must be a string, an array of strings, token ids, or arrays of token ids."
        )
    if all(isinstance(item, int) and not isinstance(item, bool) for item in raw):
        return [raw]
    if len(raw) > MAX_PROMPTS:
        raise fields.fail("prompt", f"must hold at most {MAX_PROMPTS} prompts, not {len(raw)}.")
    if all(isinstance(item, str) for item in raw):
        return [tokenizer.encode(item, add_special_tokens=special) for item in raw]
    if not all(isinstance(item, list) for item in raw):
        raise fields.fail("prompt", "must not mix strings and token ids.")
    items = Fields({f"prompt[{place}]": ids for place, ids in enumerate(raw)})
    return [items.integers(name) or [] for name in items.body]


class _Answer:
    """What one completion request wants in its answer, and the forms of that answer."""

    def __init__(self, context: Context, fields: Fields, key: Key | None, request_id: str) -> None:
        refuse_unsupported(fields)
        log_unknown(fields, KNOWN_COMPLETIONS)
        self.context = context
        self.options = StreamOptions.read(fields, force_usage=context.config.force_include_usage)
        self.echo = fields.boolean("echo")
        if isinstance(fields.raw("logprobs"), bool):
            raise fields.fail("logprobs", "must be an integer: the number of alternatives.")
        self.logprobs = read_logprobs(fields, "logprobs", context.rules)
        self.names = TokenNames(context.tokenizer, fields.boolean("return_tokens_as_token_ids"))
        self.return_token_ids = fields.boolean("return_token_ids")
        self.wants_prompt_logprobs = read_prompt_logprobs(fields, context.rules, self.options.stream)
        self.service = context.tiers.read(fields, key)
        self.target = context.adapters.resolve(fields.string("model"), key)
        request = parse_sampling(
            fields,
            context.rules,
            logprobs=self.logprobs,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            allow_zero_tokens=self.echo,
            prompt_logprobs=self._prompt_logprobs(),
        )
        prompts = read_prompts(fields, context.tokenizer)
        self.generation: Generation = context.generator.prepare(
            self.target, request, self.service, prompts, request_id
        )
        self.n = request.n
        self.skip_special_tokens = request.skip_special_tokens
        self.id = f"cmpl-{request_id}"
        self.created = int(time.time())

    def _prompt_logprobs(self) -> int | None:
        """The prompt is scored when asked for, and for `logprobs` of an echoed prompt."""
        echoed = self.logprobs if self.echo else None
        if self.wants_prompt_logprobs is None or echoed is None:
            return self.wants_prompt_logprobs if echoed is None else echoed
        return max(self.wants_prompt_logprobs, echoed)

    def prompt_of(self, index: int) -> list[int]:
        return self.generation.prompts[index // self.n]

    @property
    def _shows_tokens(self) -> bool:
        """Tokens are told of though they may have no text yet."""
        return self.logprobs is not None or self.return_token_ids

    def _prompt_text(self, index: int) -> str:
        return self.context.tokenizer.decode(self.prompt_of(index), self.skip_special_tokens)

    # ------------------------------------------------------------------ whole

    async def body(self) -> dict[str, Any]:
        choices = await self.generation.choices()
        return {
            **self._head(),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_body(self.generation.usage),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        body = self._choice_body(choice.index, choice.text, choice.finish_reason, choice.stop_reason)
        prompt = self.prompt_of(choice.index)
        if self.echo:
            body["text"] = self._prompt_text(choice.index) + choice.text
        if self.logprobs is not None:
            ids, entries = choice.token_ids, list(choice.logprobs)
            if self.echo:
                ids = [*prompt, *ids]
                entries = [*self._echoed_logprobs(choice, prompt), *entries]
            body["logprobs"] = completion_logprobs(self.names, entries, ids, 0)
        if self.wants_prompt_logprobs is not None:
            entries = trimmed(choice.prompt_logprobs or [], self.wants_prompt_logprobs)
            body["prompt_logprobs"] = prompt_logprobs(self.context.tokenizer, entries)
        if self.return_token_ids:
            body["token_ids"], body["prompt_token_ids"] = choice.token_ids, prompt
        return body

    def _echoed_logprobs(self, scored: Choice | Delta, prompt: list[int]) -> list[TokenLogprobs | None]:
        """Of the prompt's own tokens, with so many alternatives as `logprobs` says."""
        return trimmed(scored.prompt_logprobs or [None] * len(prompt), self.logprobs or 0)

    # ------------------------------------------------------------------ streamed

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        offsets: dict[int, int] = {}
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                chunks = []
                if delta.index not in offsets:
                    offsets[delta.index] = 0
                    if self.echo:
                        chunks.append(self._echo_chunk(delta, offsets))
                    if self.return_token_ids:
                        chunks = chunks or [self._wrap(self._choice_body(delta.index, "", None, None))]
                        chunks[0]["choices"][0]["prompt_token_ids"] = self.prompt_of(delta.index)
                if delta.text or delta.finish_reason is not None or self._shows_tokens:
                    chunks.append(self._delta_chunk(delta, offsets))
                if chunks:
                    yield self.options.ready(chunks)
        if self.options.include_usage:
            yield [self.options.last({**self._head(), "choices": []}, self.generation.usage)]

    def _echo_chunk(self, delta: Delta, offsets: dict[int, int]) -> dict[str, Any]:
        prompt = self.prompt_of(delta.index)
        body = self._choice_body(delta.index, self._prompt_text(delta.index), None, None)
        if self.logprobs is not None:
            entries = self._echoed_logprobs(delta, prompt)
            body["logprobs"] = self._stream_logprobs(delta.index, entries, prompt, offsets)
        return self._wrap(body)

    def _delta_chunk(self, delta: Delta, offsets: dict[int, int]) -> dict[str, Any]:
        body = self._choice_body(delta.index, delta.text, delta.finish_reason, delta.stop_reason)
        if self.logprobs is not None:
            body["logprobs"] = self._stream_logprobs(delta.index, delta.logprobs, delta.token_ids, offsets)
        if self.return_token_ids:
            body["token_ids"] = list(delta.token_ids)
        return self._wrap(body)

    def _stream_logprobs(self, index: int, entries: Any, ids: Any, offsets: dict[int, int]) -> dict[str, Any]:
        block = completion_logprobs(self.names, entries, ids, offsets[index])
        offsets[index] += text_length(self.names, ids)
        return block

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.target.name,
            "service_tier": self.service.latency_class.name,
            "system_fingerprint": self.generation.fingerprint,
        }

    def _wrap(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self.options.add_usage({**self._head(), "choices": [choice]}, self.generation.usage)

    @staticmethod
    def _choice_body(
        index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


def routes(context: Context) -> list[Route]:
    """This resource's routes."""

    async def create(request: Request) -> Response:
        """Continue texts or token ids, whole or as a stream."""
        fields = await read_json(request)
        if not fields.has("prompt"):
            raise InvalidRequest("prompt is required.", param="prompt", code="missing_required_parameter")
        take_request_id(request, fields)
        state = request.state
        answer = await prepared(partial(_Answer, context, fields, state.key, state.request_id), state.size)
        if answer.options.stream:
            return await EventStream.open(
                request, answer.events(), context.config.sse_keep_alive_interval
            )
        return json_response(await until_disconnect(request, answer.body()))

    return [Route("POST", "/v1/completions", create, USE)]
