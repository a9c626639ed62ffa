"""Calls written as Qwen's coder models do: <function=NAME><parameter=KEY>VALUE</parameter></function>."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from coserve.server.application.tool_calling.events import Arguments, Event, NoCall, Opened, begun
from coserve.server.application.tool_calling.json_reader import as_json, loads

_FUNCTION = "<function="
_PARAMETER = "<parameter="
_END_FUNCTION = "</function>"
_END_VALUE = re.compile(r"\n?</parameter>")
_END_MARKS = ("\n</parameter>", "</parameter>")
_WORDS = {"True": True, "False": False, "None": None}


class XmlReader:
    """Calls as tags, each value by its type in the function's schema: strings as they stand (a line break
    after the opening tag and one before the closing tag are layout), all else as JSON, else as a string.

    `schemas`: the parameters of the tools by name. The block ends at `close`, or where that is empty after
    one function.
    """

    def __init__(self, opening: str, close: str, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._close = close
        self._schemas = schemas
        self._state = self._between
        self._buffer = ""
        self._since = opening  # as generated since the last call's end: what NoCall gives back
        self._calls = self._parameters = 0
        self._types: Mapping[str, Any] = {}
        self._plain = True
        self._events: list[Event] = []
        self._rest: str | None = None

    @property
    def open(self) -> bool:
        return self._state not in (self._between, self._no_call)

    @property
    def held(self) -> int:
        return len(self._buffer) + (0 if self.open else len(self._since))

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        self._buffer += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events, self._rest

    def finish(self) -> list[Event]:
        left, self._buffer = self._buffer, ""
        if self._state == self._value:
            text = _escaped(left) if self._plain else left
            return [Arguments(text)] if text else []
        text = self._since + left
        cut = self._calls and self._close.startswith(text.strip())  # within the closing mark
        return [] if self.open or cut else [NoCall(text)]

    # Each state takes what it can of the buffer and says whether the next one may go on.

    def _between(self) -> bool:
        if self._calls and not self._close:
            return self._end(self._buffer, "")
        text = self._buffer.lstrip()
        if text.startswith(_FUNCTION):
            name, found, after = text[len(_FUNCTION) :].partition(">")
            if found:
                self._open(_bare(name), after)
            return bool(found)
        if self._close and text.startswith(self._close):
            return self._end(text[len(self._close) :], self._close)
        if _FUNCTION.startswith(text) or self._close.startswith(text):
            return False
        self._state = self._no_call
        return True

    def _no_call(self) -> bool:
        if not self._close or not self._calls:
            return self._end(self._buffer, "")
        before, found, after = self._buffer.partition(self._close)
        if not found:
            return False
        self._since += before
        return self._end(after, found)

    def _end(self, rest: str, mark: str) -> bool:
        self._rest, self._buffer = rest, ""
        if not self._calls:
            self._events.append(NoCall(self._since + mark))
        elif self._since.strip():
            self._events.append(NoCall(self._since))
        self._since = ""
        return False

    def _open(self, name: str, after: str) -> None:
        self._calls += 1
        self._parameters = 0
        self._since = ""
        self._buffer = after
        properties = self._schemas.get(name, {}).get("properties")
        self._types = properties if isinstance(properties, Mapping) else {}
        self._events += [Opened(name), Arguments("{")]
        self._state = self._parameter

    def _parameter(self) -> bool:
        text = self._buffer = self._buffer.lstrip()
        if text.startswith(_PARAMETER):
            key, found, after = text[len(_PARAMETER) :].partition(">")
            if found:
                self._begin(_bare(key), after)
            return bool(found)
        ended = text.startswith(_END_FUNCTION)
        if ended or (self._close and text.startswith(self._close)):
            self._events.append(Arguments("}"))
            self._buffer = text[len(_END_FUNCTION) :] if ended else text
            self._state = self._between
            return True
        if any(mark.startswith(text) for mark in (_PARAMETER, _END_FUNCTION, self._close)):
            return False
        place = text.find("<", 1)  # nothing else has a meaning between two parameters
        self._buffer = text[place:] if place > 0 else ""
        return place > 0

    def _begin(self, key: str, after: str) -> None:
        self._plain = takes_text(self._types.get(key))
        comma = ", " if self._parameters else ""
        self._parameters += 1
        self._events.append(Arguments(f"{comma}{as_json(key)}: " + ('"' if self._plain else "")))
        self._buffer = after
        self._state = self._layout

    def _layout(self) -> bool:
        if not self._buffer:
            return False
        self._buffer = self._buffer.removeprefix("\n")
        self._state = self._value
        return True

    def _value(self) -> bool:
        end = _END_VALUE.search(self._buffer)
        if end is None:
            if self._plain:
                self._say(len(self._buffer) - max(begun(self._buffer, mark) for mark in _END_MARKS))
            return False
        text, self._buffer = self._buffer[: end.start()], self._buffer[end.end() :]
        said = _escaped(text) + '"' if self._plain else as_json(_typed(text.strip()))
        self._events.append(Arguments(said))
        self._state = self._parameter
        return True

    def _say(self, size: int) -> None:
        if size:
            self._events.append(Arguments(_escaped(self._buffer[:size])))
            self._buffer = self._buffer[size:]


def _bare(name: str) -> str:
    return name.strip().strip("\"'")


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def takes_text(schema: object) -> bool:
    """Whether a value of this type is written as it stands. Unknown types are."""
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is None:
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(options, list):
            return any(takes_text(option) for option in options)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            return any(isinstance(value, str) for value in values)
        return not schema.keys() & {"$ref", "allOf", "properties", "items"}
    return kind == "string" or (isinstance(kind, list) and "string" in kind)


def _typed(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    try:
        value = loads(text)
        as_json(value)
    except (ValueError, RecursionError):
        return text
    return value
