"""The output of /v1/responses: items made of an answer's pieces, and the events that tell of them.

A whole response is what the events of a streamed one add up to.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from coserve.engine.messages import TokenLogprobs
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Reasoning
from coserve.server.application.chat_answer import AnswerDelta

Event = dict[str, Any]


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class _TextKind(NamedTuple):
    """An item that is text: its type, the type of its one part, and what both begin as."""

    item: str
    part: str
    prefix: str
    begins: dict[str, Any]
    part_begins: dict[str, Any]


_MESSAGE = _TextKind(
    "message", "output_text", "msg", {"role": "assistant"}, {"annotations": [], "logprobs": []}
)
_REASONING = _TextKind("reasoning", "reasoning_text", "rs", {"summary": []}, {})


class ResponseItems:
    """Takes an answer's deltas, fills `output`, and returns the events of each.

    White space before a call, and between thought and answer, is no message: models write line breaks there.
    """

    def __init__(self, logprobs: Callable[[Sequence[TokenLogprobs]], list[dict[str, Any]]] | None) -> None:
        self.output: list[dict[str, Any]] = []
        self._logprobs = logprobs
        self._held = ""  # white space that may not become a message
        self._held_entries: list[dict[str, Any]] = []  # the log-probabilities of its tokens
        self._open: dict[str, Any] | None = None

    def take(self, delta: AnswerDelta) -> list[Event]:
        """Events of the next delta; with its end the item that is open is closed."""
        events: list[Event] = []
        entries = self._logprobs(delta.logprobs) if self._logprobs is not None else []
        for piece in delta.pieces:
            match piece:
                case Content(text):
                    events += self._add_content(text, entries)
                    entries = []
                case Reasoning(text):
                    events += self._open_text(_REASONING)
                    events.append(self._text_delta(text, []))
                case CallOpened(_, call_id, name):
                    events += self._close("completed")
                    self._held, self._held_entries = "", []
                    item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                    events.append(self._begin("fc", item))
                case CallArguments(_, text):
                    assert self._open is not None
                    self._open["arguments"] += text
                    events.append(self._event("function_call_arguments.delta", delta=text))
        if delta.finish_reason is not None:
            events += self._finish("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def messages(self) -> list[dict[str, Any]]:
        """The output as messages of a conversation that goes on."""
        texts = [item["content"][0]["text"] for item in self.output if item["type"] == "message"]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        calls = [item for item in self.output if item["type"] == "function_call"]
        if calls:
            message["tool_calls"] = [
                {
                    "id": call["call_id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        return [message]

    # ------------------------------------------------------------------ items

    def _add_content(self, text: str, entries: list[dict[str, Any]]) -> list[Event]:
        if self._open is None or self._open["type"] != "message":
            self._held, self._held_entries = self._held + text, self._held_entries + entries
            return self._show_held() if self._held.strip() else []
        return [self._text_delta(text, entries)]

    def _show_held(self) -> list[Event]:
        text, entries = self._held, self._held_entries
        self._held, self._held_entries = "", []
        opened = self._open_text(_MESSAGE)
        return [*opened, self._text_delta(text, entries)] if text else opened

    def _open_text(self, kind: _TextKind) -> list[Event]:
        """Begin an item of text, unless it is the one that is open."""
        if self._open is not None and self._open["type"] == kind.item:
            return []
        events = self._close("completed")
        events.append(self._begin(kind.prefix, {"type": kind.item, **kind.begins, "content": []}))
        assert self._open is not None
        part, again = (deepcopy({"type": kind.part, "text": "", **kind.part_begins}) for _ in range(2))
        events.append(self._event("content_part.added", content_index=0, part=part))
        self._open["content"].append(again)
        return events

    def _text_delta(self, text: str, entries: list[dict[str, Any]]) -> Event:
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        if "logprobs" not in part:
            return self._event(f"{part['type']}.delta", content_index=0, delta=text)
        part["logprobs"] += entries
        return self._event(f"{part['type']}.delta", content_index=0, delta=text, logprobs=entries)

    def _finish(self, status: str) -> list[Event]:
        shown = [] if self.output else self._show_held()
        return shown + self._close(status)

    def _begin(self, prefix: str, item: dict[str, Any]) -> Event:
        self._open = {"id": _new_id(prefix), "status": "in_progress", **item}
        self.output.append(self._open)
        return self._item_event("output_item.added")

    def _close(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if "content" in item:
            part = item["content"][0]
            told = {name: part[name] for name in ("text", "logprobs") if name in part}
            events = [
                self._event(f"{part['type']}.done", content_index=0, **told),
                self._event("content_part.done", content_index=0, part=part),
            ]
        else:
            name, arguments = item["name"], item["arguments"]
            events = [self._event("function_call_arguments.done", name=name, arguments=arguments)]
        events.append(self._item_event("output_item.done"))
        self._open = None
        return events

    def _event(self, kind: str, **values: Any) -> Event:
        assert self._open is not None
        place = len(self.output) - 1
        return {"type": f"response.{kind}", "item_id": self._open["id"], "output_index": place, **values}

    def _item_event(self, kind: str) -> Event:
        assert self._open is not None
        copy = {**self._open, **({"content": list(self._open["content"])} if "content" in self._open else {})}
        return {"type": f"response.{kind}", "output_index": len(self.output) - 1, "item": copy}
