"""From prompt ids to pieces of text: runs samples in the engine, decodes, stops, measures.

Used by every route that generates. Closing the iterator aborts what is left in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from coserve.core.sampling_params import SamplingParams
from coserve.engine.client import EngineClient
from coserve.engine.messages import AddRequest, RequestOutput, TokenLogprobs
from coserve.errors import ContextLengthExceeded, InvalidRequest, QueueFull, RateLimited, ReaderTooSlow
from coserve.metrics import Metrics
from coserve.request_metrics import RequestTimes
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import Target
from coserve.server.application.sample_text import Chunks, Delta, TextStream
from coserve.server.application.sampling import SamplingRequest, check_token_ids
from coserve.server.application.structured_output import GrammarChecks
from coserve.server.auth import Key
from coserve.server.quotas import Quotas
from coserve.server.service_tiers import Service, ServiceTiers
from coserve.tokenizer import Tokenizer

MAX_ANSWERS = 4096  # of one request: its prompts times n


@dataclass(frozen=True)
class Sample:
    """One sequence to generate; `index` is its place among the answer's choices."""

    index: int
    prompt_token_ids: list[int]
    sampling: SamplingParams


@dataclass
class Usage:
    """Token counts of an answer: each prompt once, completions summed; `reasoning_tokens` are those of the
    completions that thought. `n` samples have one prompt; `cached` counts by prompt what most was found of it
    in the prefix cache."""

    prompt_tokens: int = 0
    n: int = 1
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        """Count one piece of the output."""
        self.completion_tokens += len(delta.token_ids)
        if delta.cached_tokens:
            prompt = delta.index // self.n
            self.cached[prompt] = max(self.cached.get(prompt, 0), delta.cached_tokens)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, found in the prefix cache."""
        return sum(self.cached.values())

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Choice:
    """A whole sample, for answers that aren't streamed."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str = "stop"
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Take one piece of the output."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class Generation:
    """All samples of one request on one target."""

    def __init__(
        self,
        generator: Generator,
        target: Target,
        request: SamplingRequest,
        service: Service,
        prompts: list[list[int]],
        request_id: str,
    ) -> None:
        self._generator = generator
        self.target = target
        self.request = request
        self.service = service
        self.prompts = prompts
        self.request_id = request_id
        self.samples = generator.samples(request, prompts)
        self.usage = Usage(sum(len(prompt) for prompt in prompts), request.n)
        self.snapshot: str | None = None
        self._lengths: dict[int, list[int]] = {}  # tokens of ended samples, by prompt

    @property
    def fingerprint(self) -> str:
        """Which weights answer: of a live adapter the snapshot once it is known, else the target's."""
        return self.snapshot or self.target.fingerprint

    async def deltas(self) -> AsyncIterator[Delta]:
        """Deltas of all samples as they come; `usage` counts along.

        Raises RateLimited, and what the engine refused the request with, before the first; Unavailable when
        the engine goes away.
        """
        generator = self._generator
        async with generator.held(self):
            streams = [generator.sample(self, sample) for sample in self.samples]
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
                async for delta in deltas:
                    self.usage.add(delta)
                    if delta.snapshot is not None:
                        self.snapshot = delta.snapshot
                    yield delta

    def sample_ended(self, sample: Sample, generated: int) -> None:
        """Count the tokens of a sample; with the last one of its prompt, that prompt."""
        lengths = self._lengths.setdefault(sample.index // self.request.n, [])
        lengths.append(generated)
        if len(lengths) == self.request.n:
            self._generator.metrics.samples_ended(len(lengths), max(lengths))

    async def choices(self) -> list[Choice]:
        """All samples to their end, in order of index."""
        choices = [Choice(sample.index) for sample in self.samples]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.index].add(delta)
        return choices


class Generator:
    """Runs samples on the engine."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        lifecycle: Lifecycle,
        metrics: Metrics,
        tiers: ServiceTiers,
        quotas: Quotas,
        max_model_len: int,
        vocab_size: int,
        check_live: Callable[[str, Key | None], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._lifecycle = lifecycle
        self.metrics = metrics
        self._tiers = tiers
        self._quotas = quotas
        self._check_live = check_live
        self._grammars = GrammarChecks()
        self._in_use: dict[str, int] = {}
        self._released = asyncio.Condition()
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size

    def prepare(
        self,
        target: Target,
        request: SamplingRequest,
        service: Service,
        prompts: list[list[int]],
        request_id: str = "",
    ) -> Generation:
        """Check prompts and lengths. What is wrong with a request is refused here; limits and targets speak
        before its first output. `request_id` is what the engine's log calls it; empty: any name."""
        self._lifecycle.check_ready()
        kept = [request.truncated(prompt, self.max_model_len) for prompt in prompts]
        return Generation(self, target, request, service, kept, request_id or uuid.uuid4().hex)

    def samples(self, request: SamplingRequest, prompts: list[list[int]]) -> list[Sample]:
        """Samples of all prompts: index = prompt * n + sample."""
        made = []
        if len(prompts) * request.n > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n {request.n} are more than {MAX_ANSWERS} answers.", param="n"
            )
        for place, prompt in enumerate(prompts):
            if not prompt:
                raise InvalidRequest("The prompt has no tokens.", param="prompt")
            check_token_ids(prompt, self.vocab_size, "prompt")
            limit = self._token_limit(request, len(prompt))
            for number in range(request.n):
                made.append(Sample(place * request.n + number, prompt, request.sampling_for(number, limit)))
        return made

    def _token_limit(self, request: SamplingRequest, prompt_tokens: int) -> int:
        room = self.max_model_len - prompt_tokens
        if request.max_tokens is None:
            if room >= 1:
                return room
            wanted = "at least 1 for the completion"
        elif request.max_tokens <= room:
            return request.max_tokens
        elif request.max_tokens_by_default and room >= 1:
            return room
        else:
            wanted = f"{request.max_tokens} for the completion"
        raise ContextLengthExceeded(
            f"The model's context is {self.max_model_len} tokens; the prompt has {prompt_tokens} and "
            f"{wanted} were asked for. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if room >= 1 else "input_tokens",
        )

    @contextlib.asynccontextmanager
    async def held(self, generation: Generation) -> AsyncIterator[None]:
        """A place for a request's samples while the block runs. Raises RateLimited when its key has none."""
        if generation.target.live_job:
            await self._check_live(generation.target.live_job, generation.service.key)
        quota = self._quotas.request(generation.service.key, generation.usage.prompt_tokens)
        with self._lifecycle.work(), quota:
            if generation.request.sampling.grammar:
                request = generation.request
                await self._grammars.check(request.sampling.grammar, request.grammar_field or "tools")
            adapter = generation.target.adapter
            async with self.using(adapter and adapter.path):
                yield

    @contextlib.asynccontextmanager
    async def using(self, path: str | None) -> AsyncIterator[None]:
        """Count somebody who may still read an adapter version's files (None: nobody's)."""
        if path is None:
            yield
            return
        self._in_use[path] = self._in_use.get(path, 0) + 1
        try:
            yield
        finally:
            self._in_use[path] -= 1
            if self._in_use[path] == 0:
                del self._in_use[path]
                async with self._released:
                    self._released.notify_all()

    async def unused(self, path: str) -> None:
        """Wait until nobody reads an adapter version's files any more."""
        async with self._released:
            await self._released.wait_for(lambda: path not in self._in_use)

    async def sample(self, generation: Generation, sample: Sample) -> AsyncIterator[Delta]:
        """One sample's deltas, measured; leaving early aborts it."""
        times = RequestTimes(arrival=time.time())
        service, request = generation.service, generation.request
        latency_class = service.latency_class.name
        text = TextStream(self._tokenizer, request)
        generated = cached = preemptions = 0
        reason, admitted, refused = "abort", False, False
        try:
            chunks = Chunks(request.stream_interval)
            async with aclosing(self._engine.generate(self._message(generation, sample, times))) as outputs:
                async for output in outputs:
                    if output.finish_reason == "abort":
                        break
                    cached = max(cached, output.cached_tokens)
                    if not admitted:
                        limit = sample.sampling.max_tokens
                        self.metrics.sample_started(len(sample.prompt_token_ids), cached, limit)
                    admitted = True
                    generated += len(output.token_ids)
                    preemptions = max(preemptions, output.num_preemptions)
                    self._measure(times, output, service)
                    delta = text.delta(sample.index, output)
                    reason = delta.finish_reason or reason
                    for chunk in chunks.take(delta):
                        yield chunk
                    if delta.finish_reason is not None:
                        break
        except (RateLimited, QueueFull):
            refused = True
            raise
        except InvalidRequest as error:
            reason = "error"
            if error.param == "grammar":  # what the engine knows it by
                error.param = request.grammar_field or "tools"
            raise
        except ReaderTooSlow:
            raise  # counts as the abort that it was
        except Exception:
            reason = "error"
            raise
        finally:
            if refused:
                self.metrics.refused(latency_class)
            else:
                prompt = len(sample.prompt_token_ids)
                self.metrics.request_ended(
                    reason, times, latency_class, prompt, generated, cached, preemptions
                )
                generation.sample_ended(sample, generated)

    def _message(self, generation: Generation, sample: Sample, times: RequestTimes) -> AddRequest:
        service, latency_class = generation.service, generation.service.latency_class
        return AddRequest(
            # Clients may give the same id twice at once; the engine's is its own.
            request_id=f"{generation.request_id}-{sample.index}-{secrets.token_hex(4)}",
            prompt_token_ids=sample.prompt_token_ids,
            sampling=sample.sampling,
            adapter=generation.target.adapter,
            live_job=generation.target.live_job,
            priority=service.priority,
            targets=self._tiers.own_targets(latency_class),
            tenant=service.key.tenant if service.key is not None else "",
            weight=service.key.weight if service.key is not None else 1.0,
            arrival=times.arrival,
            cache_salt=generation.request.cache_salt,
        )

    def _measure(self, times: RequestTimes, output: RequestOutput, service: Service) -> None:
        if output.scheduled_at is not None:
            times.scheduled = output.scheduled_at
        if not output.token_ids:
            return
        now = time.time()
        gap = None if times.last_token is None else now - times.last_token
        if times.first_token is None:
            times.first_token = now
            self.metrics.first_token(now - times.arrival, service.latency_class.name)
        times.last_token = now
        self.metrics.tokens(len(output.token_ids), gap)
        self._quotas.spend(service.key, len(output.token_ids))


async def _merge(streams: list[AsyncIterator[Delta]]) -> AsyncIterator[Delta]:
    """Items of all streams in order of arrival; the first error ends all of them. What their reader doesn't
    take stays in the streams, but for one item of each."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(len(streams))

    async def pump(stream: AsyncIterator[Delta]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
