"""The messages of a conversation, checked and brought into the form that chat templates read."""

from __future__ import annotations

from typing import Any

from coserve.errors import InvalidRequest
from coserve.server.fields import Fields, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages, each with a known role and text content; InvalidRequest names the place."""
    messages = fields.array("messages")
    if not messages:
        raise InvalidRequest("messages must hold at least one message.", param="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: object, where: str) -> dict[str, Any]:
    fields = Fields(message, f"{where}.")
    role = fields.choice("role", ROLES)
    if role is None:
        raise fields.fail("role", "is required.")
    plain = dict(fields.body)
    plain["content"] = _read_content(fields, role)
    for name in ("name", "tool_call_id"):
        fields.string(name)
    _check_calls(fields, role)
    if role == "developer":  # OpenAI's newer name for it; templates know the older
        plain["role"] = "system"
    elif role == "assistant":
        thought = fields.string("reasoning") or fields.string("reasoning_content")
        if thought is not None:  # vLLM's newer name and the one that templates read
            plain["reasoning"] = plain["reasoning_content"] = thought
        if plain["content"] is None and (refusal := fields.string("refusal")) is not None:
            plain["content"] = refusal
    return plain


def _read_content(fields: Fields, role: str) -> str | list[dict[str, str]] | None:
    content = fields.raw("content")
    if content is None:
        if role not in ("assistant", "tool", "function"):
            raise fields.fail("content", "is required.")
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.fail("content", f"must be a string or an array of text parts, not {shown(content)}.")
    return [_read_part(Fields(part, f"{fields.path}content[{n}].")) for n, part in enumerate(content)]


def _read_part(part: Fields) -> dict[str, str]:
    kind = part.string("type")
    if kind not in _PARTS:
        raise part.fail("type", f"{shown(kind)} is not supported: this server reads text only.")
    text = part.string(_PARTS[kind])
    if text is None:
        raise part.fail(_PARTS[kind], "must be a string.")
    return {"type": "text", "text": text}


def _check_calls(fields: Fields, role: str) -> None:
    calls = fields.array("tool_calls")
    if calls and role != "assistant":
        raise fields.fail("tool_calls", "belong to messages of the assistant.")
    for index, call in enumerate(calls or []):
        function = Fields(call, f"{fields.path}tool_calls[{index}].").object("function")
        if function is None or not function.required_string("name"):
            raise fields.fail(f"tool_calls[{index}].function", "is required.")
