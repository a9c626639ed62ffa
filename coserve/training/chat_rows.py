"""The rows of a training file and what makes one valid: chat rows and prompt/completion rows.

    {"messages": [{"role": ..., "content": ..., "weight": 0|1, "tool_calls": [...]}, ...], "tools": [...]}
    {"prompt": "...", "completion": "..."}

`check_row` turns a parsed JSON value into a row or raises `BadRow` with the field and the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from coserve.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class BadRow(Exception):
    """Why a row can't be trained on: the dotted `field` and the `reason`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class ChatRow:
    """A conversation; `trained[i]` says whether message i is an assistant turn that carries loss."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True)
class CompletionRow:
    """Loss on the completion (and the end token after it), none on the prompt."""

    prompt: str
    completion: str


def check_row(value: Any, tokenizer: Tokenizer) -> ChatRow | CompletionRow:
    """A row of either kind. Raises BadRow."""
    if not isinstance(value, dict):
        _bad("", "every line must be a JSON object")
    if "messages" in value and ("prompt" in value or "completion" in value):
        _bad("messages", "a row has either messages or prompt and completion, not both")
    if "messages" in value:
        return _chat_row(value, tokenizer)
    if "prompt" in value or "completion" in value:
        return _completion_row(value)
    _bad("messages", 'missing; a row is {"messages": [...]} or {"prompt": ..., "completion": ...}')


def _completion_row(value: dict[str, Any]) -> CompletionRow:
    for name in ("prompt", "completion"):
        text = value.get(name)
        if not isinstance(text, str):
            _bad(name, "must be a string" if name in value else "missing")
        _check_unicode(name, text)
    if not value["completion"]:
        _bad("completion", "is empty: there is nothing to train on")
    return CompletionRow(value["prompt"], value["completion"])


def _chat_row(value: dict[str, Any], tokenizer: Tokenizer) -> ChatRow:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        _bad("messages", "must be a non-empty list")
    for name in ("functions", "function_call"):
        if name in value:
            _bad(name, "is not supported; use tools")
    checked, trained = [], []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        checked.append(_message(message, field, tokenizer))
        trained.append(_is_trained(message, field))
    if not any(message["role"] == "assistant" for message in checked):
        _bad("messages", "needs at least one assistant message")
    return ChatRow(checked, trained, _tools(value.get("tools")))


def _message(message: Any, field: str, tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(message, dict):
        _bad(field, "must be an object")
    role = message.get("role")
    if role not in ROLES:
        _bad(f"{field}.role", f"must be one of {', '.join(ROLES)}")
    if "function_call" in message:
        _bad(f"{field}.function_call", "is not supported; use tool_calls")
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        _bad(f"{field}.tool_calls", "only assistant messages may call tools")
    content = _content(message, field, may_be_null=bool(calls))
    special = tokenizer.special_text_in(content or "")
    if special is not None:
        _bad(f"{field}.content", f"holds the special token {special}, which only the chat template may write")
    plain = {key: item for key, item in message.items() if key not in ("weight", "content", "tool_calls")}
    plain["content"] = content
    if calls:
        plain["tool_calls"] = _tool_calls(calls, f"{field}.tool_calls")
    return plain


def _content(message: dict[str, Any], field: str, may_be_null: bool) -> str | None:
    content = message.get("content")
    if content is None:
        if not may_be_null:
            _bad(f"{field}.content", "must be a string, or null beside tool_calls")
        return None
    if isinstance(content, list):
        for index, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                _bad(f"{field}.content[{index}]", "must be a text part: {'type': 'text', 'text': ...}")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        _bad(f"{field}.content", "must be a string or a list of text parts")
    _check_unicode(f"{field}.content", content)
    return content


def _is_trained(message: dict[str, Any], field: str) -> bool:
    weight = message.get("weight")
    if weight is None:
        return bool(message["role"] == "assistant")
    if message["role"] != "assistant":
        _bad(f"{field}.weight", "only assistant messages may have a weight")
    if type(weight) is not int or weight not in (0, 1):
        _bad(f"{field}.weight", "must be the integer 0 or 1")
    return bool(weight)


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        _bad(field, "must be a list")
    for index, call in enumerate(calls):
        where = f"{field}[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _bad(where, "must be an object with a name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                _bad(f"{where}.arguments", "must be JSON in a string")
        if not isinstance(arguments, dict):
            _bad(f"{where}.arguments", "must be a JSON object in a string")
    return calls


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list):
        _bad("tools", "must be a list")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _bad(f"tools[{index}]", 'must be {"type": "function", "function": {"name": ..., ...}}')
    return tools or None


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _bad(field, "holds a lone surrogate, which is not valid Unicode")


def _bad(field: str, reason: str) -> NoReturn:
    raise BadRow(field, reason)
