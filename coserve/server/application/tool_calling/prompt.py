"""Tools told in messages, for models whose chat template has no variable for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat_template import plain_message

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


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """For templates that know no tools, the form that Hermes models made common: the tools in the first
    system or user message, calls as their text, and tools' answers as what the user says next."""
    told: list[dict[str, Any]] = []
    answers: list[str] = []
    for message in map(plain_message, messages):
        if message["role"] == "tool":
            answers.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if answers:
            told.append({"role": "user", "content": "\n".join(answers)})
            answers = []
        calls = message.pop("tool_calls", None) or ()
        lines = [message["content"]] if message["content"] else []
        told.append({**message, "content": "\n".join([*lines, *map(_call, calls)])})
    if answers:
        told.append({"role": "user", "content": "\n".join(answers)})
    if tools:
        text = _TELLS.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        place = next((n for n, m in enumerate(told) if m["role"] in ("system", "user")), None)
        if place is None:
            told.insert(0, {"role": "user", "content": text})
        elif told[place]["role"] == "system":
            told[place]["content"] += "\n\n" + text
        else:
            told[place]["content"] = text + "\n\n" + told[place]["content"]
    return told


def reads_system_message(template: str) -> bool:
    """Whether a template takes the tools from the system message, as Phi-4-mini's does."""
    return _SYSTEM_TOOLS.search(template) is not None


def in_system_message(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """For such templates: the functions as JSON in `tools` of the first message, calls as their text, and
    what tools answered under the role that the model has a token for."""
    told = [plain_message(message) for message in messages]
    for message in told:
        calls = message.pop("tool_calls", None)
        if calls:
            made = [
                {"name": c["function"]["name"], "arguments": c["function"].get("arguments", {})}
                for c in calls
            ]
            message["content"] += f"<|tool_call|>{json.dumps(made, ensure_ascii=False)}<|/tool_call|>"
        if message["role"] == "tool":
            message["role"] = "tool_response"
    if tools:
        if told[0]["role"] != "system":
            told.insert(0, {"role": "system", "content": _SYSTEM})
        told[0]["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return told


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"
