"""coserve.v1.InferenceService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc.aio

from coserve import __version__
from coserve.errors import InvalidRequest
from coserve.server.application.chat import Conversation, read_conversation
from coserve.server.application.chat_answer import AnswerDelta, AnswerForm, ChatAnswers
from coserve.server.application.generation import Generation
from coserve.server.application.sample_text import Delta
from coserve.server.application.sampling import parse_sampling, read_logprobs
from coserve.server.application.structured_output import read_kind
from coserve.server.auth import Key
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from coserve.server.grpc_generation import Responses, request_body
from coserve.server.grpc_guard import key_of, name_call
from coserve.server.http import read_request_id
from coserve.server.preparing import prepared

_OF_MESSAGES = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "include_reasoning",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
)


@dataclass(frozen=True)
class _Asked:
    """A generation, and what its answers may hold beside text (None: a prompt's, which is text alone)."""

    generation: Generation
    form: AnswerForm | None

    def deltas(self) -> AsyncIterator[Delta | AnswerDelta]:
        if self.form is None or (self.form.tools is None and self.form.reasoning is None):
            return self.generation.deltas()
        return ChatAnswers(self.generation, self.form).deltas()


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Generation, and facts about the server."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the output of one prompt."""
        key = key_of(self._context, context.invocation_metadata())
        name = name_call(context, request.request_id)
        asked = await prepared(lambda: self._prepare(request_body(request), key, name), request.ByteSize())
        responses = Responses(self._context.tokenizer, asked.generation, request.return_prompt_token_ids)
        is_first = True
        async with aclosing(asked.deltas()) as deltas:
            async for delta in deltas:
                if is_first:
                    # Not before: a refused call ends with its status alone, so it may be tried again.
                    is_first = False
                    await context.send_initial_metadata((("x-request-id", name),))
                yield responses.of(delta)

    def _prepare(self, body: dict[str, Any], key: Key | None, name: str) -> _Asked:
        context = self._context
        fields = Fields(body)
        read_request_id(fields)
        sampling = fields.object("sampling_params") or Fields({}, "sampling_params.")
        service = context.tiers.read(fields, key)
        target = context.adapters.resolve(fields.string("model"), key)
        prompt, conversation = self._prompt(fields)
        request = parse_sampling(
            sampling,
            context.rules,
            logprobs=read_logprobs(sampling, "logprobs", context.rules),
            default_max_tokens=None,
            prompt_logprobs=read_logprobs(sampling, "prompt_logprobs", context.rules),
            constraint=read_kind(sampling, "json_schema"),
        )
        if conversation is not None:
            request = conversation.sampling(request)
        generation = context.generator.prepare(target, request, service, [prompt], name)
        return _Asked(generation, conversation.form if conversation is not None else None)

    def _prompt(self, fields: Fields) -> tuple[list[int], Conversation | None]:
        given = [name for name in ("prompt", "token_ids", "messages") if fields.has(name)]
        if len(given) != 1:
            raise InvalidRequest("Exactly one of prompt, token_ids and messages is required.", param="prompt")
        if given == ["messages"]:
            conversation = read_conversation(fields, self._context.chat)
            return conversation.token_ids, conversation
        for name in _OF_MESSAGES:
            if fields.has(name):
                raise fields.fail(name, f"goes with messages, not with {given[0]}.")
        if given == ["token_ids"]:
            return fields.integers("token_ids") or [], None
        special = fields.boolean("add_special_tokens", True)
        return self._context.tokenizer.encode(fields.required_string("prompt"), special), None

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerInfo:
        """What is served, and its limits."""
        base, info = self._context.base, self._context.engine.info
        return pb.ServerInfo(
            version=__version__,
            model=base.name,
            max_model_len=base.max_model_len,
            vocab_size=base.vocab_size,
            device=info.device if info else "",
            dtype=info.dtype if info else "",
            max_lora_rank=self._context.config.engine.max_lora_rank,
            ready=self._context.lifecycle.ready,
        )
