"""Fast rendering of conversations to training segments, equal to the Jinja chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.demo_model.tasks_tools import Message

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclass
class Conversation:
    """Messages in the chat format plus the tool schemas offered in the system block."""

    messages: list[Message]
    tools: list[dict[str, object]] = field(default_factory=list)


def assistant_text(message: Message) -> str:
    """The text the model has to produce for an assistant message, without the end marker."""
    parts = [str(message["content"])] if message.get("content") else []
    for call in message.get("tool_calls", ()):  # type: ignore[union-attr]
        function = call["function"]
        arguments = json.dumps(function["arguments"])
        parts.append(
            f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}\n</tool_call>'
        )
    return "\n".join(parts)


def segments(conversation: Conversation) -> list[tuple[str, bool]]:
    """Split the rendering into ``(text, is_target)`` pieces; targets end with ``<|im_end|>``."""
    messages: Sequence[Message] = conversation.messages
    system = str(messages[0]["content"]) if messages[0]["role"] == "system" else ""
    context = ""
    if conversation.tools:
        head = f"{system}\n\n" if messages[0]["role"] == "system" else ""
        listed = "".join("\n" + json.dumps(tool) for tool in conversation.tools)
        context = f"<|im_start|>system\n{head}{_TOOLS_HEAD}{listed}{_TOOLS_TAIL}<|im_end|>\n"
    elif messages[0]["role"] == "system":
        context = f"<|im_start|>system\n{system}<|im_end|>\n"
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        if message["role"] == "user":
            context += f"<|im_start|>user\n{message['content']}<|im_end|>\n"
        elif message["role"] == "tool":
            context += (
                f"<|im_start|>user\n<tool_response>\n{message['content']}\n</tool_response><|im_end|>\n"
            )
        elif message["role"] == "assistant":
            pieces.append((context + "<|im_start|>assistant\n", False))
            pieces.append((assistant_text(message) + "<|im_end|>", True))
            context = "\n"
    return pieces
