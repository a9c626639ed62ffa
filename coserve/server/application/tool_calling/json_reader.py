"""Calls written as JSON, whose arguments are passed on as they are generated."""

from __future__ import annotations

import json
import re
from typing import Any

from coserve.server.application.tool_calling.events import Arguments, Event, NoCall, Opened, begun

_IN_STRING = re.compile(r'["\\]')
_IN_VALUE = re.compile(r'["{}\[\]]|[^\s\w:,.+\-]')
_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"(?:name|function)"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_KEYS = frozenset({"name", "function", "type", "id", "arguments", "parameters"})
_LONGEST_HEAD = 1024
_SEPARATORS = " \t\r\n,;[]"


class JsonScan:
    """Finds the end of a JSON value in text that comes in pieces; `depth` 1 begins inside an object."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._string = self._escaped = False
        self.broken = False

    def feed(self, text: str, start: int = 0) -> int | None:
        """Where the value ends in `text`, or None. `broken` and the place, at what JSON can't hold there."""
        place = start
        while place < len(text):
            if self._escaped:
                self._escaped = False
                place += 1
                continue
            hit = (_IN_STRING if self._string else _IN_VALUE).search(text, place)
            if hit is None:
                return None
            char, place = hit.group(), hit.end()
            if self._string:
                self._string = char != '"'
                self._escaped = char == "\\"
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
            else:
                self.broken = True
                return hit.start()
        return None


def call_in(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) that a JSON object describes, or None."""
    try:
        data = loads(text)
        name = data.get("name") or data.get("function") if isinstance(data, dict) else None
        if not isinstance(name, str) or not name or not _is_text(name):
            return None
        arguments = data.get("arguments", data.get("parameters"))
        if arguments is None:
            return name, "{}"
        if isinstance(arguments, str):
            return (name, arguments) if _is_text(arguments) else None
        return (name, as_json(arguments)) if isinstance(arguments, dict) else None
    except (ValueError, RecursionError):
        return None


def loads(text: str) -> Any:
    """The value of JSON text; ValueError, also for the numbers that only Python knows."""
    return json.loads(text, parse_constant=_no_number)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def as_json(value: object) -> str:
    """A value as JSON text that can be sent: half a surrogate pair stays an escape. ValueError or TypeError
    for what JSON can't say."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(value)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _string(literal: str) -> str | None:
    try:
        text: str = json.loads(literal)
    except ValueError:
        return None
    return text if _is_text(text) else None


class JsonReader:
    """Calls as JSON objects, {"name": ..., "arguments" or "parameters": {...}}: one, several, or a list.

    The block ends at `close`; where the format has none, after the list or at what is neither a call nor
    between two. `names`: others are no calls; None lets any name be one.
    """

    def __init__(self, opening: str, close: str, names: frozenset[str] | None) -> None:
        self._close = close
        self._names = names
        self._state = self._between
        self._buffer = ""
        self._since = opening  # as generated since the last call's end: what NoCall gives back
        self._calls = 0
        self._list = False
        self._scan = JsonScan()
        self._scanned = 0
        self._events: list[Event] = []
        self._rest: str | None = None

    @property
    def open(self) -> bool:
        return self._state == self._arguments

    @property
    def held(self) -> int:
        telling = self._state in (self._arguments, self._broken, self._remainder)
        return len(self._buffer) + (0 if telling else len(self._since))

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        self._buffer += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events, self._rest

    def finish(self) -> list[Event]:
        left, self._buffer = self._buffer, ""
        if self._state in (self._arguments, self._broken):
            return [Arguments(left)] if left else []
        text = self._since + left
        cut = self._calls and self._close.startswith(text.strip(_SEPARATORS))  # within the closing mark
        return [] if cut else [NoCall(text)]

    # Each state takes what it can of the buffer and says whether the next one may go on.

    def _between(self) -> bool:
        size = next((n for n, char in enumerate(self._buffer) if char not in _SEPARATORS), len(self._buffer))
        for place, char in enumerate(self._buffer[:size]):
            self._list = self._list or char == "["
            if char == "]" and self._list and not self._close:
                self._take(place + 1)
                return self._end("")
        self._take(size)
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            self._scan, self._scanned = JsonScan(), 0
            self._state = self._head
            return True
        if self._close:
            if self._buffer.startswith(self._close):
                return self._end(self._close)
            if self._close.startswith(self._buffer):
                return False
        self._state = self._no_call
        return True

    def _head(self) -> bool:
        head = _HEAD.match(self._buffer, 0, _LONGEST_HEAD)
        if head is not None:
            name = _string(head.group(1))
            if name is None or not self._known(name):
                self._state = self._no_call
                return True
            self._open(name)
            self._buffer = self._buffer[head.end() :]
            self._scan = JsonScan()
            self._state = self._arguments
            return True
        first = _FIRST_KEY.match(self._buffer)
        if first is not None and first.group(1) not in _KEYS:
            self._state = self._no_call
            return True
        end = self._scan.feed(self._buffer, self._scanned)
        self._scanned = len(self._buffer)
        if end is None:
            return False
        call = None if self._scan.broken else call_in(self._buffer[:end])
        if call is None or not self._known(call[0]):
            self._state = self._no_call
            return True
        self._open(call[0])
        self._buffer = self._buffer[end:]
        self._events.append(Arguments(call[1]))
        self._state = self._between
        return True

    def _arguments(self) -> bool:
        end = self._scan.feed(self._buffer)
        self._say(len(self._buffer) if end is None else end)
        if end is None:
            return False
        if self._scan.broken:
            self._state = self._broken
        else:
            self._scan = JsonScan(depth=1)
            self._state = self._remainder
        return True

    def _broken(self) -> bool:
        """Arguments that are no JSON: all up to the block's end is theirs."""
        place = self._buffer.find(self._close) if self._close else -1
        if place >= 0:
            self._say(place)
            return self._end(self._close)
        self._say(len(self._buffer) - begun(self._buffer, self._close))
        return False

    def _remainder(self) -> bool:
        """The object's end after its arguments; what else it holds, such as an id, says nothing."""
        end = self._scan.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._state = self._between
        return True

    def _no_call(self) -> bool:
        if not self._close or not self._calls:
            return self._end("")
        place = self._buffer.find(self._close)
        if place < 0:
            return False
        self._take(place)
        return self._end(self._close)

    def _end(self, mark: str) -> bool:
        self._rest = self._buffer[len(mark) :]
        self._buffer = ""
        if not self._calls:
            self._events.append(NoCall(self._since + mark))
        elif self._since.strip(_SEPARATORS):
            self._events.append(NoCall(self._since))
        self._since = ""
        return False

    def _take(self, size: int) -> None:
        self._since += self._buffer[:size]
        self._buffer = self._buffer[size:]

    def _say(self, size: int) -> None:
        if size:
            self._events.append(Arguments(self._buffer[:size]))
            self._buffer = self._buffer[size:]

    def _open(self, name: str) -> None:
        self._calls += 1
        self._since = ""
        self._events.append(Opened(name))

    def _known(self, name: str) -> bool:
        return self._names is None or name in self._names
