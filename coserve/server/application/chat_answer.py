"""A chat answer in pieces: a sample's text split into reasoning, content and tool calls, streamed or whole.

Every route that answers a conversation reads these pieces: a streamed answer put together is the whole one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from coserve.engine.messages import TokenLogprobs
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Piece, Reasoning
from coserve.server.application.generation import Generation
from coserve.server.application.reasoning import ReasoningFormat, ReasoningParser
from coserve.server.application.sample_text import Delta
from coserve.server.application.tool_calling.formats import ToolFormat
from coserve.server.application.tool_calling.parser import ToolCallParser


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may hold beside content.

    `schemas`: the parameters of the tools by name. `named`: one tool was demanded, and its call is the whole
    answer. `inside`: the answer begins within reasoning.
    """

    tools: ToolFormat | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel_tool_calls: bool = True
    named: bool = False
    reasoning: ReasoningFormat | None = None
    inside: bool = False
    include_reasoning: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that have a meaning here: their tokens are shown also where special tokens are not."""
        tools = self.tools.marks if self.tools is not None else ()
        return tools + (self.reasoning.marks if self.reasoning is not None else ())


@dataclass(frozen=True)
class AnswerDelta:
    """What became known of one answer: its pieces in order, the tokens behind them, and maybe its end.

    Tokens come with their text, not before it.
    """

    index: int
    pieces: Sequence[Piece] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class ToolCall:
    """One call: `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """A whole answer: one sample's pieces put together."""

    index: int
    content: str = ""
    reasoning: str = ""
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
                case Reasoning(text):
                    self.reasoning += text
                case CallOpened(_, id, name):
                    self.calls.append(ToolCall(id, name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason


class AnswerSplitter:
    """Splits one sample's deltas into pieces. `reasoning_tokens` counts those of its reasoning."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._reasoning = ReasoningParser(form.reasoning, form.inside) if form.reasoning is not None else None
        limit = None if form.parallel_tool_calls else 1
        self._tools = ToolCallParser(form.tools, form.schemas, limit) if form.tools is not None else None
        self._tokens: deque[tuple[int, Delta]] = deque()  # deltas not passed on: where their text ends
        self._fed = 0
        self._undecided = 0  # tokens that may turn out to open the reasoning
        self.reasoning_tokens = 0

    def split(self, delta: Delta) -> AnswerDelta:
        """The pieces that a delta completes, with the tokens up to their end."""
        pieces = self._pieces(delta)
        passed = self._passed(delta)
        return AnswerDelta(
            index=delta.index,
            pieces=pieces,
            token_ids=[token for part in passed for token in part.token_ids],
            logprobs=[entry for part in passed for entry in part.logprobs],
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=self._finish_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
        )

    def _passed(self, delta: Delta) -> Sequence[Delta]:
        """The deltas whose text has been told to its end, oldest first."""
        if delta.finish_reason is not None:
            passed = [part for _, part in self._tokens]
            self._tokens.clear()
            return [*passed, delta]
        held = self._reasoning.held if self._reasoning is not None else 0
        held += self._tools.held if self._tools is not None else 0
        if not (held or delta.held or self._tokens):
            return (delta,)
        self._fed += len(delta.text)
        self._tokens.append((self._fed + delta.held, delta))
        passed = []
        while self._tokens and self._tokens[0][0] <= self._fed - held:
            passed.append(self._tokens.popleft()[1])
        return passed

    def _pieces(self, delta: Delta) -> Sequence[Piece]:
        last = delta.finish_reason is not None
        if self._reasoning is None and self._tools is None:
            return (Content(delta.text),) if delta.text else ()
        pieces: list[Piece] = []
        for piece in self._reasoned(delta, last):
            if not isinstance(piece, Content) or self._tools is None:
                pieces.append(piece)
            else:
                pieces += self._tools.feed(piece.text)
        if last and self._tools is not None:
            pieces += self._tools.finish()
        if not self._form.include_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return _joined(pieces)

    def _reasoned(self, delta: Delta, last: bool) -> list[Piece]:
        if self._reasoning is None:
            return [Content(delta.text)] if delta.text else []
        thought = self._reasoning.thinking
        pieces = self._reasoning.feed(delta.text)
        if self._reasoning.undecided:
            self._undecided += len(delta.token_ids)
        elif thought or self._reasoning.thinking:
            self.reasoning_tokens += self._undecided + len(delta.token_ids)
            self._undecided = 0
        return pieces + self._reasoning.finish() if last else pieces

    def _finish_reason(self, reason: str | None) -> str | None:
        """A demanded tool's call is the answer itself, and a cut call is none that could be made."""
        tools = self._tools
        if reason == "stop" and tools is not None and tools.calls and not tools.cut and not self._form.named:
            return "tool_calls"
        return reason


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of a kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        match joined[-1] if joined else None, piece:
            case Content(before), Content(text):
                joined[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                joined[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                joined[-1] = CallArguments(index, before + text)
            case _:
                joined.append(piece)
    return joined


class ChatAnswers:
    """The answers of one generation, read as `form` says."""

    def __init__(self, generation: Generation, form: AnswerForm) -> None:
        self.generation = generation
        self.form = form

    async def deltas(self) -> AsyncIterator[AnswerDelta]:
        """Of all answers as they come; raises as Generation.deltas does."""
        splitters = [AnswerSplitter(self.form) for _ in self.generation.samples]
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                splitter = splitters[delta.index]
                before = splitter.reasoning_tokens
                answer = splitter.split(delta)
                self.generation.usage.reasoning_tokens += splitter.reasoning_tokens - before
                yield answer

    async def answers(self) -> list[Answer]:
        """All answers to their end, in order of index."""
        answers = [Answer(sample.index) for sample in self.generation.samples]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        return answers
