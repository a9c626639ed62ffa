"""A request to /v1/responses read as a chat request: items become messages, errors get the names back."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.errors import CoserveError
from coserve.server.application.request_fields import OWN_RESPONSES, REFUSED_RESPONSES
from coserve.server.fields import Fields, shown

LOGPROBS = "message.output_text.logprobs"
_WITHOUT_EFFECT = "reasoning.encrypted_content"  # nothing of a model's reasoning is hidden here
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


@dataclass(frozen=True)
class ResponseInput:
    """`items` and `messages`: what this request adds, as it is listed and as the template takes it;
    `instructions` a message that goes first; `body` the rest as a chat request."""

    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    instructions: list[dict[str, Any]]
    body: dict[str, Any]

    def chat_body(self, history: Sequence[dict[str, Any]], dropped: int = 0) -> dict[str, Any]:
        """The whole chat request, after the messages of the responses before it; the first `dropped` of what
        was said are left out."""
        said = [*history, *self.messages]
        return {**self.body, "messages": [*self.instructions, *said[dropped:]]}

    def cuts(self, history: Sequence[dict[str, Any]]) -> list[int]:
        """How many messages may be dropped: up to one of the user, the last of which stays."""
        said = [*history, *self.messages]
        return [place for place, message in enumerate(said) if message["role"] == "user" and place]


def read_input(fields: Fields) -> ResponseInput:
    """The chat request that a Responses request means.

    Raises InvalidRequest naming the field.
    """
    _refuse_unsupported(fields)
    items = _items(fields)
    messages = _Messages()
    for place, item in enumerate(items):
        messages.add(Fields(item, f"input[{place}]."))
    instructions = fields.string("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    body = {name: value for name, value in fields.body.items() if name not in OWN_RESPONSES}
    body |= {**_tools(fields), **_text(fields), **_logprobs(fields)}
    if fields.has("max_output_tokens"):
        body["max_tokens"] = fields.integer("max_output_tokens", None, 1)
    reasoning = fields.object("reasoning")
    if reasoning is not None and reasoning.has("effort"):
        body["reasoning_effort"] = reasoning.string("effort")
    return ResponseInput([listed(item) for item in items], messages.made, system, body)


def renamed(error: CoserveError) -> CoserveError:
    """An error of the chat request, with the names that fields have in /v1/responses."""
    param = error.param or ""
    for chat, own in _NAMES:
        new = chat.sub(own, param)
        if new != param:
            error.message, error.param = error.message.replace(param, new, 1), new
            break
    return error


_NAMES = tuple(
    (re.compile(pattern), own)
    for pattern, own in (
        (r"^messages\b.*", "input"),
        (r"^response_format(\.json_schema)?\b", "text.format"),
        (r"^max_tokens$", "max_output_tokens"),
        (r"^(tools\[\d+\])\.function\b", r"\1"),
        (r"^tool_choice\.function\b", "tool_choice"),
        (r"^tool_choice\.allowed_tools(\.tools\[\d+\])\.function\b", r"tool_choice\1"),
        (r"^tool_choice\.allowed_tools\b", "tool_choice"),
        (r"^reasoning_effort$", "reasoning.effort"),
    )
)


def _refuse_unsupported(fields: Fields) -> None:
    for name, reason in REFUSED_RESPONSES.items():
        if fields.has(name) and fields.raw(name) is not False:
            raise fields.fail(name, f"{reason}.")
    fields.choice("truncation", ("auto", "disabled"))
    for name, kind in (("max_tool_calls", "integer"), ("user", "string"), ("store", "boolean")):
        getattr(fields, kind)(name)
    for place, name in enumerate(fields.strings("include") or []):
        if name not in (LOGPROBS, _WITHOUT_EFFECT):
            raise fields.fail(f"include[{place}]", f"{shown(name)} is not supported; {LOGPROBS} is.")


def _items(fields: Fields) -> list[dict[str, Any]]:
    given = fields.raw("input")
    if isinstance(given, str) and given:
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.fail("input", "is required: a string, or an array of items.")
    return given


def listed(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as a kept response lists it: with an id, a message's text as a part."""
    kind = item.get("type", "message")
    whole = {
        "id": f"{_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}",
        "status": "completed",
        **item,
        "type": kind,
    }
    if kind == "message" and isinstance(whole["content"], str):
        part = "output_text" if whole["role"] == "assistant" else "input_text"
        more = {"annotations": []} if part == "output_text" else {}
        whole["content"] = [{"type": part, "text": whole["content"], **more}]
    return whole


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class _Messages:
    """Messages of the chat template, made of items in their order."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def add(self, item: Fields) -> None:
        """Take the next item."""
        kind = item.string("type", "message")
        if kind == "message":
            role = item.choice("role", _ROLES)
            if role is None:
                raise item.fail("role", "is required.")
            self.made.append({"role": role, "content": _content(item, "content")})
        elif kind == "function_call":
            function = {"name": item.required_string("name"), "arguments": item.string("arguments") or "{}"}
            call = {"id": item.required_string("call_id"), "type": "function", "function": function}
            self._calls().append(call)
        elif kind == "function_call_output":
            call_id = item.required_string("call_id")
            output = _content(item, "output")
            self.made.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind != "reasoning":  # what was thought in earlier turns is not shown again
            raise item.fail(
                "type", f"{shown(kind)} is not supported: messages, function calls and outputs are."
            )

    def _calls(self) -> list[dict[str, Any]]:
        """The calls of the assistant's message that one more belongs to."""
        if not self.made or self.made[-1]["role"] != "assistant":
            self.made.append({"role": "assistant", "content": None})
        calls: list[dict[str, Any]] = self.made[-1].setdefault("tool_calls", [])
        return calls


def _content(item: Fields, name: str) -> str:
    """The text of a content: a string, or parts of text."""
    given = item.raw(name)
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise item.fail(name, f"must be a string or an array of text parts, not {shown(given)}.")
    texts = []
    for place, part in enumerate(given):
        fields = Fields(part, f"{item.path}{name}[{place}].")
        kind = fields.string("type")
        if kind not in _TEXTS:
            raise fields.fail("type", f"{shown(kind)} is not supported: this server reads text only.")
        text = fields.string(_TEXTS[kind])
        if text is None:
            raise fields.fail(_TEXTS[kind], "must be a string.")
        texts.append(text)
    return "".join(texts)


def _tools(fields: Fields) -> dict[str, Any]:
    """`tools` and `tool_choice` as chat has them."""
    tools = []
    for place, given in enumerate(fields.array("tools") or []):
        tool = Fields(given, f"tools[{place}].")
        if tool.string("type") != "function":
            reason = "is not supported: only functions of your own are"
            raise tool.fail("type", f"{shown(tool.raw('type'))} {reason}.")
        function = {"name": tool.required_string("name")}
        function |= {
            name: tool.raw(name) for name in ("description", "parameters", "strict") if tool.has(name)
        }
        tools.append({"type": "function", "function": function})
    choice = fields.raw("tool_choice")
    if isinstance(choice, Mapping):
        choice = _chosen(Fields(choice, "tool_choice."))
    if not tools and choice in ("auto", "none"):
        choice = None  # clients send it with every request
    return {name: value for name, value in (("tools", tools or None), ("tool_choice", choice)) if value}


def _chosen(choice: Fields) -> dict[str, Any]:
    kind = choice.choice("type", ("function", "allowed_tools"))
    if kind is None:
        raise choice.fail("type", "is required.")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.required_string("name")}}
    allowed = []
    for place, entry in enumerate(choice.array("tools") or []):
        fields = Fields(entry, f"tool_choice.tools[{place}].")
        fields.choice("type", ("function",), "function")
        allowed.append({"type": "function", "function": {"name": fields.required_string("name")}})
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.raw("mode"), "tools": allowed}}


def _text(fields: Fields) -> dict[str, Any]:
    """`text.format` as chat's response_format."""
    text = fields.object("text")
    if text is None:
        return {}
    text.string("verbosity")
    form = text.object("format")
    if form is None:
        return {}
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise form.fail("type", "is required.")
    if kind != "json_schema":
        return {"response_format": {"type": kind}}
    if form.object("schema") is None:
        raise form.fail("schema", "is required with type json_schema.")
    schema = {name: form.raw(name) for name in ("name", "schema", "strict", "description") if form.has(name)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _logprobs(fields: Fields) -> dict[str, Any]:
    if LOGPROBS in (fields.strings("include") or []):
        return {"logprobs": True, "top_logprobs": fields.raw("top_logprobs")}
    if fields.integer("top_logprobs", 0):
        raise fields.fail("top_logprobs", f"needs include: {LOGPROBS}.")
    return {}
