"""Sampling sessions: fixed weights to sample from, and samples as futures."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from coserve.errors import Gone, RateLimited, Unavailable
from coserve.server.application.generation import Generator
from coserve.server.application.models import Target
from coserve.server.application.sampling import SamplingRequest
from coserve.server.auth import Key, owns
from coserve.server.service_tiers import Service
from coserve.server.tinker.answers import Answer, Sampled, SampledSequence
from coserve.server.tinker.futures import Future

PATIENCE = 600.0  # seconds that a sample waits for a limit or for the engine before it fails


@dataclass(frozen=True)
class Sampler:
    """`path` None: the base. `digest` is that of what was saved there when it was made."""

    id: str
    session_id: str
    tenant: str
    base_model: str
    path: str | None
    digest: str = ""


@dataclass(frozen=True)
class SampleCall:
    """What is wanted. `top` and `prompt_top` alternatives at each position; the prompt's last `last_n` tokens
    are scored, all of them where it is None, none of them without `scores_prompt`."""

    prompt: list[int]
    request: SamplingRequest
    top: int
    scores_prompt: bool
    prompt_top: int
    last_n: int | None


class Samplers:
    """Those of one server, by id."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._by_id: dict[str, Sampler] = {}

    def add(self, sampler: Sampler) -> None:
        """A new one, or the same again."""
        self._by_id[sampler.id] = sampler

    def get(self, sampler_id: str, key: Key | None) -> Sampler:
        """One of this key's; Gone."""
        sampler = self._by_id.get(sampler_id)
        if sampler is None or not owns(key, sampler.tenant):
            reason = f"The sampling session {sampler_id[:200]!r} has ended."
            raise Gone(reason, param="sampling_session_id")
        return sampler

    def remove(self, sampler_id: str) -> None:
        """Its session has ended."""
        self._by_id.pop(sampler_id, None)

    async def sample(self, call: SampleCall, target: Target, service: Service, future: Future) -> Answer:
        """All samples of a call. Limits, full queues and an engine that starts are waited for, and told of in
        the future's `queue_state`."""
        waited = 0.0
        while True:
            try:
                return await self._sample(call, target, service)
            except (RateLimited, Unavailable) as error:
                if waited > PATIENCE:
                    raise
                limited = isinstance(error, RateLimited)
                future.queue_state = "paused_rate_limit" if limited else "paused_capacity"
                future.reason = error.message
                pause = min(max(error.retry_after, 0.1), 10.0)
                await asyncio.sleep(pause)
                waited += pause

    async def _sample(self, call: SampleCall, target: Target, service: Service) -> Answer:
        generation = self._generator.prepare(target, call.request, service, [call.prompt])
        sequences = [SampledSequence() for _ in generation.samples]
        prompt = None
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                sequence = sequences[delta.index]
                sequence.tokens += delta.token_ids
                sequence.logprobs += delta.logprobs
                prompt = delta.prompt_logprobs if delta.prompt_logprobs is not None else prompt
                if delta.finish_reason is not None:
                    sequence.stop_reason = "length" if delta.finish_reason == "length" else "stop"
        scored = list(prompt) if prompt is not None and call.scores_prompt else None
        if scored is not None and call.last_n is not None:
            scored[: len(scored) - call.last_n] = [None] * (len(scored) - call.last_n)
        cached = generation.usage.cached_tokens
        return Sampled(sequences, scored, call.top, call.prompt_top, cached).answer()
