"""The checks of a job's `publish_if`: files of questions, asked of the adapter before it is published.

A file has training rows: of a chat the last message is the right answer, of prompt/completion the completion.
They are asked greedily as ordinary requests of the class `flex`, behind everybody else's.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coserve.engine.messages import AdapterRef
from coserve.errors import DatasetError, InvalidRequest, LineError, QueueFull, RateLimited
from coserve.server.application.files import Files
from coserve.server.application.generation import Generator
from coserve.server.application.models import Target
from coserve.server.application.sampling import SamplingRules, parse_sampling
from coserve.server.auth import Key
from coserve.server.fields import Fields
from coserve.server.job_store import Check, CheckResult, PublishGate
from coserve.server.service_tiers import ServiceTiers
from coserve.training.chat_rows import ChatRow
from coserve.training.data_file import bounded_lines
from coserve.training.rows import BadRow, CompletionRow, check_row

MAX_QUESTIONS = 1000
_AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is right."""

    prompt: list[int]
    answer: str


class PublishChecks:
    """Keeps the questions of a job's checks beside it, and asks them."""

    def __init__(self, generator: Generator, tiers: ServiceTiers, rules: SamplingRules, files: Files) -> None:
        self._generator = generator
        self._service = tiers.read(Fields({"service_tier": "flex"}), None)
        self._rules = rules
        self._tokenizer = rules.tokenizer
        self._files = files

    async def keep(self, gate: PublishGate | None, key: Key | None, folder: Path) -> None:
        """Keep the checks' files (`key`'s) in a job's folder, read once to see that they can be asked.

        Raises NotFound for a file that isn't there, DatasetError for one with bad lines.
        """
        for index, check in enumerate(gate.checks if gate is not None else ()):
            param = f"publish_if.checks[{index}].file"
            await self._files.get(check.file, key, param)
            source = self._files.path(check.file)
            await asyncio.to_thread(self._questions, source, check, param)
            await asyncio.to_thread(_keep, source, _kept(folder, index))

    async def run(self, gate: PublishGate, folder: Path, adapter: AdapterRef) -> list[CheckResult]:
        """Ask all questions of one version. Raises Unavailable when the engine goes away meanwhile."""
        target = Target(adapter.name, adapter)
        results = []
        for index, check in enumerate(gate.checks):
            read = partial(self._questions, _kept(folder, index), check, "publish_if")
            questions = await asyncio.to_thread(read)
            right = await self._ask(target, check, questions)
            results.append(
                CheckResult(name=check.name, score=right / len(questions), questions=len(questions))
            )
        return results

    async def _ask(self, target: Target, check: Check, questions: Sequence[Question]) -> int:
        places = asyncio.Semaphore(_AT_ONCE)

        async def is_right(question: Question) -> bool:
            async with places:
                answer = (await self._answer(target, check, question)).strip()
            wanted = question.answer.strip()
            return answer == wanted if check.match == "exact" else wanted in answer

        asked = [asyncio.ensure_future(is_right(question)) for question in questions]
        try:
            return sum(await asyncio.gather(*asked))
        finally:
            for task in asked:
                task.cancel()

    async def _answer(self, target: Target, check: Check, question: Question) -> str:
        sampling = parse_sampling(
            Fields({"temperature": 0, "max_tokens": check.max_tokens}),
            self._rules,
            logprobs=None,
            default_max_tokens=check.max_tokens,
        )
        while True:
            generation = self._generator.prepare(target, sampling, self._service, [question.prompt])
            try:
                (choice,) = await generation.choices()
            except (RateLimited, QueueFull) as error:
                await asyncio.sleep(error.retry_after)  # those in front of it are served first
            else:
                return choice.text

    def _questions(self, path: Path, check: Check, param: str) -> list[Question]:
        """A file's questions; DatasetError names the line that is none."""
        found: list[Question] = []
        with path.open("rb") as file:
            for number, text in enumerate(bounded_lines(file), start=1):
                if not text.strip():
                    continue
                try:
                    found.append(self._question(text, check))
                except BadRow as error:
                    raise _bad_line(LineError(number, error.field, error.reason), param) from None
                except (ValueError, RecursionError) as error:
                    raise _bad_line(LineError(number, "", str(error)), param) from None
                if len(found) > MAX_QUESTIONS:
                    reason = f"a check has at most {MAX_QUESTIONS} questions"
                    raise _bad_line(LineError(number, "", reason), param)
        if not found:
            raise _bad_line(LineError(1, "", "the file has no question"), param)
        return found

    def _question(self, text: bytes, check: Check) -> Question:
        row = check_row(json.loads(text), self._tokenizer)
        if isinstance(row, ChatRow) and row.messages[-1]["role"] == "assistant":
            try:
                prompt = self._tokenizer.encode_chat(row.messages[:-1], row.tools)
            except InvalidRequest as error:  # the template refuses them
                raise BadRow("messages", error.message) from None
            answer = row.messages[-1].get("content")
        elif isinstance(row, CompletionRow) and row.prompt:
            prompt, answer = self._tokenizer.encode(row.prompt), row.completion
        else:
            raise ValueError("a question is a chat that ends with the answer, or prompt and completion")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError("the right answer has no text")
        room = self._generator.max_model_len - len(prompt)
        if check.max_tokens > room:
            raise ValueError(f"the prompt leaves {room} tokens, max_tokens is {check.max_tokens}")
        return Question(prompt, answer)


def _kept(folder: Path, index: int) -> Path:
    return folder / f"check-{index}.jsonl"


def _keep(source: Path, kept: Path) -> None:
    """Uploaded files never change, so a second name keeps one that is deleted meanwhile."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, kept)


def _bad_line(line: LineError, param: str) -> DatasetError:
    return DatasetError([line], 1, param=param)
