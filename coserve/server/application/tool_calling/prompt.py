"""Tools told in messages, for models whose chat template knows none, in the form that Hermes made common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat_template import plain_message

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
    """The messages with the tools in the first system or user message, calls as their text, and tools'
    answers as what the user says next."""
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


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    body = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>"
