"""Between InferenceService's messages and the application layer: requests as fields, deltas as messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from coserve.engine.messages import TokenLogprobs
from coserve.errors import InvalidRequest
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Reasoning
from coserve.server.application.chat_answer import AnswerDelta
from coserve.server.application.generation import Generation
from coserve.server.application.sample_text import Delta
from coserve.server.grpc_convert import plain
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.tokenizer import Tokenizer

_CHOICES = ("none", "auto", "required")


def request_body(request: pb.GenerateRequest) -> dict[str, Any]:
    """A request in the words of the chat completions' body, which the application layer reads."""
    body = plain(request)
    if "messages" in body:
        body["messages"] = [_message_body(message, place) for place, message in enumerate(body["messages"])]
    if "tools" in body:
        body["tools"] = [_tool_body(tool, place) for place, tool in enumerate(body["tools"])]
    choice = body.get("tool_choice")
    if choice is not None and choice not in _CHOICES:
        body["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if "chat_template_kwargs" in body:
        body["chat_template_kwargs"] = _json(body["chat_template_kwargs"], "chat_template_kwargs")
    return body


def _message_body(message: dict[str, Any], place: int) -> dict[str, Any]:
    parts = message.pop("parts", None)
    if parts is not None:
        if "content" in message:
            raise InvalidRequest(
                f"messages[{place}].parts can't be combined with content.", param=f"messages[{place}].parts"
            )
        message["content"] = [{"type": "text", "text": text} for text in parts]
    elif "tool_calls" not in message:
        message.setdefault("content", "")
    if "tool_calls" in message:
        message["tool_calls"] = [
            {
                "id": call.get("id", ""),
                "type": "function",
                "function": {"name": call.get("name", ""), "arguments": call.get("arguments", "{}")},
            }
            for call in message["tool_calls"]
        ]
    return message


def _tool_body(tool: dict[str, Any], place: int) -> dict[str, Any]:
    if "parameters" in tool:
        tool["parameters"] = _json(tool["parameters"], f"tools[{place}].parameters")
    return {"type": "function", "function": tool}


def _json(text: str, where: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(f"{where} must be JSON.", param=where) from None


class Responses:
    """The messages of one generation."""

    def __init__(self, tokenizer: Tokenizer, generation: Generation, with_prompt: bool) -> None:
        self._tokenizer = tokenizer
        self._generation = generation
        self._started: set[int] = set()
        self._with_prompt = with_prompt

    def of(self, delta: Delta | AnswerDelta) -> pb.GenerateResponse:
        """A delta as a message."""
        if isinstance(delta, Delta):
            response = pb.GenerateResponse(index=delta.index, text=delta.text, token_ids=delta.token_ids)
        else:
            response = pb.GenerateResponse(index=delta.index, token_ids=delta.token_ids)
            self._add_pieces(response, delta)
        if delta.logprobs:
            response.logprobs.extend(self._logprobs(delta.logprobs))
        if delta.index not in self._started:
            self._started.add(delta.index)
            self._begin(response, delta)
        if delta.finish_reason is not None:
            self._end(response, delta)
        return response

    @staticmethod
    def _add_pieces(response: pb.GenerateResponse, delta: AnswerDelta) -> None:
        for piece in delta.pieces:
            match piece:
                case Content(text):
                    response.text += text
                case Reasoning(text):
                    response.reasoning += text
                case CallOpened(index, id, name):
                    response.tool_calls.add(index=index, id=id, name=name)
                case CallArguments(index, text):
                    calls = response.tool_calls
                    call = calls[-1] if calls and calls[-1].index == index else calls.add(index=index)
                    call.arguments += text

    def _begin(self, response: pb.GenerateResponse, delta: Delta | AnswerDelta) -> None:
        if delta.prompt_logprobs is not None:
            known = [entry for entry in delta.prompt_logprobs if entry is not None]
            response.prompt_logprobs.extend(self._logprobs(known))
        if self._with_prompt:
            response.prompt_token_ids.extend(self._generation.prompts[0])

    def _end(self, response: pb.GenerateResponse, delta: Delta | AnswerDelta) -> None:
        generation = self._generation
        usage = generation.usage
        response.finish_reason = delta.finish_reason or ""
        if isinstance(delta.stop_reason, str):
            response.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            response.stop_token_id = delta.stop_reason
        response.service_tier = generation.service.latency_class.name
        response.snapshot = generation.snapshot or ""
        response.system_fingerprint = generation.fingerprint
        response.usage.CopyFrom(
            pb.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
                cached_tokens=usage.cached_tokens,
                reasoning_tokens=usage.reasoning_tokens,
            )
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> list[pb.TokenLogprob]:
        text = self._tokenizer.token_text
        return [
            pb.TokenLogprob(
                token_id=entry.token_id,
                token=text(entry.token_id),
                logprob=entry.logprob,
                rank=entry.rank,
                top=[pb.TopLogprob(token_id=id, token=text(id), logprob=value) for id, value in entry.top],
            )
            for entry in entries
        ]
