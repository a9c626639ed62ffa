"""Tools told in messages, for models whose chat template has no variable for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SYSTEM_TOOLS = re.compile(r"message(\['tools'\]|\[\"tools\"\]|\.tools\b)")
_SYSTEM = "You are a helpful assistant with some tools."
_TELLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


Messages = list[dict[str, Any]]


def with_tools(messages: Messages, tools: Sequence[Mapping[str, Any]] | None, template: str) -> Messages:
    """Plain messages as this template has to get them, so that it shows tools, calls and their results."""
    if _SYSTEM_TOOLS.search(template):
        return _in_system_message(messages, tools)
    if "tools" in template or "tool_calls" in template:
        return messages
    return _in_first_message(messages, tools)


def _in_first_message(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> Messages:
    """For templates that know no tools, the form that Hermes models made common: the tools in the first
    message, calls as their text, and tools' answers as what the user says next."""
    told: Messages = []
    answers: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            answers.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if answers:
            told.append({"role": "user", "content": "\n".join(answers)})
            answers = []
        calls = message.get("tool_calls") or ()
        lines = [message["content"]] if message["content"] else []
        content = "\n".join([*lines, *map(_call, calls)])
        told.append(
            {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
        )
    if answers:
        told.append({"role": "user", "content": "\n".join(answers)})
    if tools:
        text = _TELLS.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        first = told[0] if told else {}
        if first.get("role") == "system":
            first["content"] += "\n\n" + text
        elif first.get("role") == "user":
            first["content"] = text + "\n\n" + first["content"]
        else:
            told.insert(0, {"role": "user", "content": text})
    return told


def _in_system_message(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> Messages:
    """For templates that take the tools from the system message, as Phi-4-mini's does: the functions as JSON
    in its `tools`, calls as their text, and results under the role that the model has a token for."""
    told = [dict(message) for message in messages]
    for message in told:
        calls = message.pop("tool_calls", None)
        if calls:
            made = json.dumps([_function(call) for call in calls], ensure_ascii=False)
            message["content"] += f"<|tool_call|>{made}<|/tool_call|>"
        if message.get("role") == "tool":
            message["role"] = "tool_response"
    if tools:
        if not told or told[0].get("role") != "system":
            told.insert(0, {"role": "system", "content": _SYSTEM})
        told[0]["tools"] = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    return told


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": function.get("arguments", {})}


def _call(call: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(_function(call), ensure_ascii=False)}\n</tool_call>"
