"""coserve.v1.InferenceService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio

from coserve import __version__
from coserve.errors import InvalidRequest
from coserve.server.application.chat import read_conversation
from coserve.server.application.generation import Generation
from coserve.server.application.sample_text import Delta
from coserve.server.application.sampling import parse_sampling, read_logprobs
from coserve.server.application.structured_output import read_kind
from coserve.server.auth import Key
from coserve.server.context import Context
from coserve.server.fields import Fields
from coserve.server.grpc_convert import plain
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from coserve.server.grpc_guard import id_of, key_of
from coserve.server.preparing import prepared


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Generation, and facts about the server."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the output of one prompt."""
        metadata = context.invocation_metadata()
        key, name = key_of(self._context, metadata), id_of(metadata)
        context.set_trailing_metadata((("x-request-id", name),))
        generation = await prepared(lambda: self._prepare(plain(request), key, name), request.ByteSize())
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                yield self._response(delta, generation)

    def _prepare(self, body: dict[str, object], key: Key | None, request_id: str) -> Generation:
        context = self._context
        fields = Fields(body)
        sampling = fields.object("sampling_params") or Fields({}, "sampling_params.")
        service = context.tiers.read(fields, key)
        target = context.adapters.resolve(fields.string("model"), key)
        request = parse_sampling(
            sampling,
            context.rules,
            logprobs=read_logprobs(sampling, "logprobs", context.rules),
            default_max_tokens=None,
            constraint=read_kind(sampling, "json_schema"),
        )
        return context.generator.prepare(target, request, service, [self._prompt(fields)], request_id)

    def _prompt(self, fields: Fields) -> list[int]:
        given = [name for name in ("prompt", "token_ids", "messages") if fields.has(name)]
        if len(given) != 1:
            raise InvalidRequest("Exactly one of prompt, token_ids and messages is required.", param="prompt")
        if given == ["prompt"]:
            return self._context.tokenizer.encode(fields.required_string("prompt"))
        if given == ["token_ids"]:
            return fields.integers("token_ids") or []
        messages = [{"content": "", **message} for message in fields.array("messages") or []]
        return read_conversation(Fields({"messages": messages}), self._context.chat).token_ids

    def _response(self, delta: Delta, generation: Generation) -> pb.GenerateResponse:
        tokenizer = self._context.tokenizer
        response = pb.GenerateResponse(text=delta.text, token_ids=delta.token_ids)
        for entry in delta.logprobs:
            response.logprobs.append(
                pb.TokenLogprob(
                    token_id=entry.token_id,
                    token=tokenizer.token_text(entry.token_id),
                    logprob=entry.logprob,
                    top=[
                        pb.TopLogprob(token_id=token, token=tokenizer.token_text(token), logprob=logprob)
                        for token, logprob in entry.top
                    ],
                )
            )
        if delta.finish_reason is not None:
            usage = generation.usage
            response.finish_reason = delta.finish_reason
            response.service_tier = generation.service.latency_class.name
            response.snapshot = generation.snapshot or ""
            response.usage.CopyFrom(
                pb.Usage(
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    total_tokens=usage.total_tokens,
                    cached_tokens=usage.cached_tokens,
                )
            )
        return response

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
