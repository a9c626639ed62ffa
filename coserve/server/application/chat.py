"""A chat request's conversation: messages and tools checked, rendered by the model's template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.errors import InvalidRequest
from coserve.server.application.chat_answer import AnswerForm
from coserve.server.fields import Fields, shown
from coserve.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOOL_CHOICES = ("none", "auto", "required")
_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class Conversation:
    """Token ids of a conversation, and what its answer may hold."""

    token_ids: list[int]
    form: AnswerForm
    continued: str = ""


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
    content = fields.raw("content")
    if content is None:
        if role not in ("assistant", "tool", "function"):
            raise fields.fail("content", "is required.")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(Fields(part, f"{where}.content[{index}]."))
    elif not isinstance(content, str):
        raise fields.fail("content", f"must be a string or an array of text parts, not {shown(content)}.")
    calls = fields.array("tool_calls")
    for index, call in enumerate(calls or []):
        function = Fields(call, f"{where}.tool_calls[{index}].").object("function")
        if function is None or not function.required_string("name"):
            raise fields.fail(f"tool_calls[{index}].function", "is required.")
    plain = dict(fields.body)
    if role == "developer":
        plain["role"] = "system"
    return plain


def _check_part(part: Fields) -> None:
    kind = part.string("type")
    if kind not in ("text", "refusal"):
        raise part.fail("type", f"{shown(kind)} is not supported: this server reads text only.")
    if part.string(kind) is None:
        raise part.fail(kind, "must be a string.")


def read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, bool]:
    """(tools for the template or None, whether to look for calls in the answer)."""
    tools = fields.array("tools")
    choice = fields.raw("tool_choice")
    if tools is not None and not tools:
        raise InvalidRequest("tools must not be empty; leave it out instead.", param="tools")
    for index, tool in enumerate(tools or []):
        entry = Fields(tool, f"tools[{index}].")
        entry.choice("type", ("function",), "function")
        function = entry.object("function")
        if function is None:
            raise entry.fail("function", "is required.")
        function.required_string("name")
        function.object("parameters")
    if choice is not None:
        _check_choice(fields, choice, tools)
    if tools is None or choice == "none":
        return None, False
    return tools, True


def _check_choice(fields: Fields, choice: object, tools: list[dict[str, Any]] | None) -> None:
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if tools is not None and name not in [tool["function"]["name"] for tool in tools]:
            raise fields.fail("tool_choice", f"names {shown(name)}, which is not among tools.")
        raise fields.fail("tool_choice", "forcing a named tool is not supported; use auto or none.")
    if choice not in _TOOL_CHOICES:
        raise fields.fail("tool_choice", f"must be none or auto, not {shown(choice)}.")
    if choice == "required":
        raise fields.fail("tool_choice", "required is not supported; use auto or none.")
    if tools is None and choice == "auto":
        raise fields.fail("tool_choice", "needs tools.")


def read_conversation(fields: Fields, tokenizer: Tokenizer) -> Conversation:
    """Check, render and tokenise a request's conversation."""
    messages = read_messages(fields)
    tools, parse_tools = read_tools(fields)
    kwargs = fields.object("chat_template_kwargs")
    variables = dict(kwargs.body) if kwargs is not None else {}
    reserved = sorted(variables.keys() & _RESERVED)
    if reserved:
        raise fields.fail(f"chat_template_kwargs.{reserved[0]}", "is set by the request's own fields.")
    add_prompt = fields.boolean("add_generation_prompt", True)
    continued = fields.boolean("continue_final_message")
    if continued and fields.has("add_generation_prompt") and add_prompt:
        raise fields.fail("continue_final_message", "can't be combined with add_generation_prompt.")
    text = tokenizer.render_chat(
        messages,
        tools,
        add_generation_prompt=add_prompt and not continued,
        continue_final_message=continued,
        **variables,
    )
    special = fields.boolean("add_special_tokens", False)
    return Conversation(
        token_ids=tokenizer.encode(text, add_special_tokens=special),
        form=AnswerForm(parse_tools, fields.boolean("parallel_tool_calls", True)),
        continued=str(messages[-1].get("content") or "") if continued else "",
    )
