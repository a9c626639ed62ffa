"""A chat answer in pieces: the text of a sample split into content and tool calls, streamed or whole.

Every route that answers a conversation reads these pieces: a streamed answer put together is the whole one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from coserve.engine.messages import TokenLogprobs
from coserve.server.application.generation import Delta, Generation
from coserve.server.application.tool_calls import ToolCall, ToolCallParser


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class CallOpened:
    """A tool call begins: its place among the answer's calls, its id and the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, JSON text."""

    index: int
    text: str


Piece = Content | CallOpened | CallArguments


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may hold beside content."""

    tools: bool = False
    parallel_tool_calls: bool = True


@dataclass(frozen=True)
class AnswerDelta:
    """What became known of one answer: its pieces in order, the tokens behind them, and maybe its end."""

    index: int
    pieces: Sequence[Piece] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class Answer:
    """A whole answer: one sample's pieces put together."""

    index: int
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str = "stop"
    stop_reason: str | int | None = None

    def add(self, delta: AnswerDelta) -> None:
        """Take the next delta."""
        for piece in delta.pieces:
            match piece:
                case Content(text):
                    self.content += text
                case CallOpened(_, id, name):
                    self.calls.append(ToolCall(name, "", id))
                case CallArguments(index, text):
                    call = self.calls[index]
                    self.calls[index] = ToolCall(call.name, call.arguments + text, call.id)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class _Splitter:
    """Splits one sample's deltas into pieces."""

    def __init__(self, form: AnswerForm) -> None:
        limit = None if form.parallel_tool_calls else 1
        self._tools = ToolCallParser(limit) if form.tools else None

    def split(self, delta: Delta) -> AnswerDelta:
        """The pieces that a delta completes."""
        reason = delta.finish_reason
        pieces: list[Piece] = []
        if self._tools is None:
            if delta.text:
                pieces.append(Content(delta.text))
        else:
            pieces = self._with_calls(self._tools, delta)
            if reason == "stop" and self._tools.calls:
                reason = "tool_calls"
        return AnswerDelta(
            index=delta.index,
            pieces=pieces,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=reason,
            stop_reason=delta.stop_reason,
        )

    def _with_calls(self, parser: ToolCallParser, delta: Delta) -> list[Piece]:
        text, calls = parser.feed(delta.text)
        if delta.finish_reason is not None:
            text += parser.finish()
        pieces: list[Piece] = [Content(text)] if text else []
        for index, call in enumerate(calls, start=parser.calls - len(calls)):
            pieces += [CallOpened(index, call.id, call.name), CallArguments(index, call.arguments)]
        return pieces


class ChatAnswers:
    """The answers of one generation, read as `form` says."""

    def __init__(self, generation: Generation, form: AnswerForm) -> None:
        self.generation = generation
        self.form = form

    async def deltas(self) -> AsyncIterator[AnswerDelta]:
        """Of all answers as they come; raises as Generation.deltas does."""
        splitters = [_Splitter(self.form) for _ in self.generation.samples]
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                yield splitters[delta.index].split(delta)

    async def answers(self) -> list[Answer]:
        """All answers to their end, in order of index."""
        answers = [Answer(sample.index) for sample in self.generation.samples]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        return answers
