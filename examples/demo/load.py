"""Chat clients that ask at a steady rate and note when each piece of an answer came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

MAX_TOKENS = 96


@dataclass
class Answer:
    """One streamed answer. Times are `time.monotonic()` seconds, in `arrivals` one for each piece."""

    model: str
    question: str
    phase: str
    started: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:])]


async def ask(client: AsyncOpenAI, model: str, question: str, phase: str = "") -> Answer:
    """Stream one greedy answer; a failure is noted in `error`, not raised."""
    answer = Answer(model, question, phase, time.monotonic())
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage:
                answer.tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                answer.arrivals.append(time.monotonic())
                answer.text += chunk.choices[0].delta.content
    except OpenAIError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


class Clients:
    """`len(models)` clients, each starting a question every `period` seconds (or as soon as it is free).

    `models[i]` may be changed while they run: client i uses it from its next question on. `phase` marks the
    answers that begin under it.
    """

    def __init__(
        self, client: AsyncOpenAI, models: list[str], questions: Sequence[str], period: float
    ) -> None:
        self.models = models
        self.phase = ""
        self.answers: list[Answer] = []
        self._client = client
        self._questions = questions
        self._period = period
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Let the clients begin, spread evenly over the period."""
        self._tasks = [asyncio.create_task(self._run(index)) for index in range(len(self.models))]

    async def stop(self) -> None:
        """Let every client finish its answer; an error of a client's own is raised here."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def _run(self, index: int) -> None:
        due = time.monotonic() + self._period * index / len(self.models)
        asked = index * 5
        while not await self._stopped_before(due):
            question = self._questions[asked % len(self._questions)]
            self.answers.append(await ask(self._client, self.models[index], question, self.phase))
            asked += 1
            due = max(due + self._period, time.monotonic())

    async def _stopped_before(self, due: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), max(due - time.monotonic(), 0.0))
        except TimeoutError:
            return False
        return True
