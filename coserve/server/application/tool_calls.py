"""Tool calls in generated text, as Hermes-style templates write them: `<tool_call>{JSON}</tool_call>`."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call: `arguments` is JSON text, as OpenAI gives it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass
class ToolCallParser:
    """Splits streamed text into content and calls.

    Text that may turn out to open a call is held back. A block that holds no valid call, or that the end of
    the output cuts, is content after all, so nothing the model said is lost. `limit` bounds the calls kept
    (1 without parallel calls); further ones are dropped.
    """

    limit: int | None = None
    calls: int = 0
    _buffer: str = ""
    _inside: bool = False

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """(content to show now, calls completed now)."""
        self._buffer += text
        shown: list[str] = []
        found: list[ToolCall] = []
        while True:
            mark = _CLOSE if self._inside else _OPEN
            before, hit, after = self._buffer.partition(mark)
            if not hit:
                break
            self._buffer = after
            if self._inside:
                call = parse_call(before)
                if call is None:
                    shown.append(_OPEN + before + _CLOSE)
                elif self.limit is None or self.calls < self.limit:
                    self.calls += 1
                    found.append(call)
            else:
                shown.append(before)
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._buffer) - _begun(self._buffer, _OPEN)
            shown.append(self._buffer[:cut])
            self._buffer = self._buffer[cut:]
        content = "".join(shown)
        if self.calls and not content.strip():
            content = ""
        return content, found

    def finish(self) -> str:
        """What was held back, at the end of the output."""
        rest = (_OPEN if self._inside else "") + self._buffer
        self._buffer, self._inside = "", False
        return rest if not self.calls or rest.strip() else ""


def _begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def parse_call(block: str) -> ToolCall | None:
    """The call that a block's JSON describes, or None."""
    try:
        data = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not data["name"]:
        return None
    arguments = data.get("arguments", data.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(data["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(data["name"], json.dumps(arguments, ensure_ascii=False))
