"""The messages of a training row and what makes them valid.

    {"role": ..., "content": ..., "weight": 0|1, "tool_calls": [...]}

The checks raise `BadRow` with the field and the reason; `field` is where the messages lie in the row
("messages", "prompt", "input.messages", "preferred_output").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from coserve.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_PASSED_ON = frozenset({"weight", "content", "tool_calls", "refusal", "audio"})


class BadRow(Exception):
    """Why a row can't be trained on: the dotted `field` and the `reason`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class Turns:
    """Checked messages as the chat template takes them; `trained[i]` says whether message i is an assistant
    turn that carries loss, `fields[i]` where it lies in the row."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    fields: list[str]

    def part(self, start: int, stop: int | None = None) -> Turns:
        """Messages [start, stop)."""
        where = slice(start, stop)
        return Turns(self.messages[where], self.trained[where], self.fields[where])


@dataclass(frozen=True)
class ChatRow(Turns):
    """A conversation."""

    tools: list[dict[str, Any]] | None


def bad(field: str, reason: str) -> NoReturn:
    """Refuse the row."""
    raise BadRow(field, reason)


def read_chat(value: Mapping[str, Any], tokenizer: Tokenizer) -> ChatRow:
    """A row of `messages`: every assistant turn is trained unless its weight is 0."""
    return _chat(value, "", read_turns(value["messages"], "messages", tokenizer))


def join_chat(value: Mapping[str, Any], prefix: str, prompt: Turns, answer: Turns) -> ChatRow:
    """A prompt and its answer as one conversation, of which only the answer carries loss. `value`, whose
    fields are named with `prefix`, holds the tools."""
    silent = [False] * len(prompt.trained)
    joined = Turns(prompt.messages + answer.messages, silent + answer.trained, prompt.fields + answer.fields)
    return _chat(value, prefix, joined)


def _chat(value: Mapping[str, Any], prefix: str, turns: Turns) -> ChatRow:
    row = ChatRow(turns.messages, turns.trained, turns.fields, read_tools(value, prefix))
    _check_parallel_calls(value, prefix, row)
    return row


def read_turns(messages: Any, field: str, tokenizer: Tokenizer, *, needs_answer: bool = True) -> Turns:
    """Check the list of messages at `field`; with `needs_answer` one of them must be the assistant's."""
    if not isinstance(messages, list) or not messages:
        bad(field, "must be a non-empty list of messages")
    fields = [f"{field}[{index}]" for index in range(len(messages))]
    checked, trained = [], []
    for message, where in zip(messages, fields, strict=True):
        checked.append(_message(message, where, tokenizer))
        trained.append(_is_trained(message, where))
    if needs_answer and not any(message["role"] == "assistant" for message in checked):
        bad(field, "needs at least one assistant message")
    return Turns(checked, trained, fields)


def read_tools(value: Mapping[str, Any], prefix: str) -> list[dict[str, Any]] | None:
    """The row's `tools`; the older `functions` and `function_call` are refused by name."""
    for name in ("functions", "function_call"):
        if value.get(name) is not None:
            bad(prefix + name, "is not supported; use tools")
    tools = value.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        bad(f"{prefix}tools", "must be a list")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            bad(f"{prefix}tools[{index}]", 'must be {"type": "function", "function": {"name": ..., ...}}')
    return tools or None


def check_unicode(field: str, text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        bad(field, "holds a lone surrogate, which is not valid Unicode")


# ---------------------------------------------------------------- one message


def _message(message: Any, field: str, tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(message, dict):
        bad(field, "must be an object")
    role = message.get("role")
    if role not in ROLES:
        hint = "; use tool" if role == "function" else ""
        bad(f"{field}.role", f"must be one of {', '.join(ROLES)}{hint}")
    if message.get("function_call") is not None:
        bad(f"{field}.function_call", "is not supported; use tool_calls")
    if message.get("audio") is not None:
        bad(f"{field}.audio", "is not supported: the model reads and writes text")
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None and not isinstance(message[name], str):
            bad(f"{field}.{name}", "must be a string")
    plain = {key: item for key, item in message.items() if key not in _NOT_PASSED_ON}
    if role == "developer":  # what the chat route makes of it
        plain["role"] = "system"
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        bad(f"{field}.tool_calls", "only assistant messages may call tools")
    plain["content"] = _said(message, field, may_be_null=bool(calls))
    if calls:
        plain["tool_calls"] = _tool_calls(calls, f"{field}.tool_calls")
    for where, text in _strings(plain, field):
        special = tokenizer.special_text_in(text)
        if special is not None:
            bad(where, f"holds the special token {special}, which only the chat template may write")
    return plain


def _said(message: dict[str, Any], field: str, *, may_be_null: bool) -> str | None:
    """The content; of an assistant that refuses, the refusal in its place."""
    refusal = message.get("refusal")
    if refusal is None:
        return _content(message, field, may_be_null=may_be_null)
    if message["role"] != "assistant":
        bad(f"{field}.refusal", "only assistant messages may refuse")
    if not isinstance(refusal, str):
        bad(f"{field}.refusal", "must be a string")
    if message.get("content"):
        bad(f"{field}.refusal", "can't stand beside content; give one of the two")
    check_unicode(f"{field}.refusal", refusal)
    return refusal


def _content(message: dict[str, Any], field: str, *, may_be_null: bool) -> str | None:
    content = message.get("content")
    if content is None:
        if not may_be_null:
            bad(f"{field}.content", "must be a string, or null beside tool_calls")
        return None
    if isinstance(content, list):
        kinds = ("text", "refusal") if message["role"] == "assistant" else ("text",)
        texts = []
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in kinds or not isinstance(part.get(kind), str):
                bad(f"{field}.content[{index}]", "must be a text part: {'type': 'text', 'text': ...}")
            texts.append(part[kind])
        content = "\n".join(texts)
    if not isinstance(content, str):
        bad(f"{field}.content", "must be a string or a list of text parts")
    check_unicode(f"{field}.content", content)
    return content


def _is_trained(message: dict[str, Any], field: str) -> bool:
    weight = message.get("weight")
    if weight is None:
        return bool(message["role"] == "assistant")
    if message["role"] != "assistant":
        bad(f"{field}.weight", "only assistant messages may have a weight")
    if type(weight) is not int or weight not in (0, 1):
        bad(f"{field}.weight", "must be the integer 0 or 1")
    return bool(weight)


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        bad(field, "must be a list")
    for index, call in enumerate(calls):
        where = f"{field}[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            bad(where, "must be an object with a name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                bad(f"{where}.arguments", "must be JSON in a string")
        if not isinstance(arguments, dict):
            bad(f"{where}.arguments", "must be a JSON object in a string")
    return calls


def _check_parallel_calls(value: Mapping[str, Any], prefix: str, row: ChatRow) -> None:
    """`parallel_tool_calls` says how the turns were made; false and two calls in one turn don't agree."""
    parallel = value.get("parallel_tool_calls")
    if parallel is None:
        return
    if not isinstance(parallel, bool):
        bad(f"{prefix}parallel_tool_calls", "must be true or false")
    for field, message in zip(row.fields, row.messages, strict=True):
        calls = message.get("tool_calls", ())
        if not parallel and len(calls) > 1:
            bad(f"{field}.tool_calls", f"has {len(calls)} calls, but parallel_tool_calls is false")


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """(field, text) of every string in a value, keys aside."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{field}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{field}[{index}]")
