"""Calls written as Python: [weather(city="Paris"), time()], as some Llama and OLMo models do."""

from __future__ import annotations

import ast
import re

from coserve.server.application.tool_calling.events import Arguments, Event, NoCall, Opened
from coserve.server.application.tool_calling.json_reader import as_json

_NAME = re.compile(r"([\w.\-]+)\(")
_NAME_BEGUN = re.compile(r"[\w.\-]+")
_KEY = re.compile(r"\s*,?\s*([A-Za-z_]\w*)\s*=\s*(?=\S)")
_STEP = re.compile(r"[\"'(\[{}\])\\,]")
_SEPARATORS = " \t\r\n,;"
_LONGEST_NAME = 256
_WORDS = {"true": True, "false": False, "null": None}


class PythonReader:
    """Calls with keyword arguments, each passed on once its value is whole.

    `listed`: the block is a list, from "[" to "]"; else calls stand one after another until `close`.
    `names`: others are no calls; None lets any name be one.
    """

    def __init__(self, opening: str, close: str, names: frozenset[str] | None, listed: bool) -> None:
        self._close = "]" if listed else close
        self._separators = _SEPARATORS if listed else _SEPARATORS + "[]"
        self._names = names
        self._state = self._list if listed else self._between
        self._buffer = ""
        self._since = opening  # as generated since the last call's end: what NoCall gives back
        self._calls = self._arguments = 0
        self._scanned = 0
        self._nesting: list[str] = []  # open brackets and quotes within a value
        self._events: list[Event] = []
        self._rest: str | None = None

    @property
    def open(self) -> bool:
        return self._state == self._argument

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
        if self.open:
            return []
        text = self._since + left
        cut = self._calls and self._close.startswith(text.strip(self._separators))  # within the closing mark
        return [] if cut else [NoCall(text)]

    # Each state takes what it can of the buffer and says whether the next one may go on.

    def _list(self) -> bool:
        if not self._buffer:
            return False
        self._take(1)
        self._state = self._between
        return True

    def _between(self) -> bool:
        self._take(len(self._buffer) - len(self._buffer.lstrip(self._separators)))
        if not self._buffer:
            return False
        if self._buffer.startswith(self._close):
            return self._end(self._close)
        if self._close.startswith(self._buffer):
            return False
        name = _NAME.match(self._buffer, 0, _LONGEST_NAME)
        if name is not None and (self._names is None or name.group(1) in self._names):
            self._calls += 1
            self._arguments = 0
            self._since = ""
            self._events += [Opened(name.group(1)), Arguments("{")]
            self._buffer = self._buffer[name.end() :]
            self._scanned, self._nesting = 0, []
            self._state = self._argument
            return True
        if len(self._buffer) < _LONGEST_NAME and _NAME_BEGUN.fullmatch(self._buffer):
            return False
        self._state = self._no_call
        return True

    def _argument(self) -> bool:
        """One keyword argument, or the call's end."""
        end = self._value_end()
        if end is None:
            return False
        text, char = self._buffer[:end], self._buffer[end]
        self._buffer = self._buffer[end + 1 :]
        self._scanned = 0
        key = _KEY.match(text)
        if key is not None:
            comma = ", " if self._arguments else ""
            self._arguments += 1
            value = as_json(_literal(text[key.end() :].strip()))
            self._events.append(Arguments(f"{comma}{as_json(key.group(1))}: {value}"))
        if char == ")":
            self._events.append(Arguments("}"))
            self._state = self._between
        return True

    def _value_end(self) -> int | None:
        """Where the argument ends: the place of its comma or of the call's closing bracket."""
        place = self._scanned
        while (hit := _STEP.search(self._buffer, place)) is not None:
            char, place = hit.group(), hit.end()
            quote = self._nesting[-1] if self._nesting and self._nesting[-1] in "\"'" else ""
            if char == "\\":
                if place == len(self._buffer):
                    self._scanned = hit.start()
                    return None
                place += 1
            elif quote:
                if char == quote:
                    self._nesting.pop()
            elif char in "\"'([{":
                self._nesting.append(char)
            elif char in ")]}":
                if not self._nesting:
                    return hit.start()
                self._nesting.pop()
            elif not self._nesting:
                return hit.start()
        self._scanned = len(self._buffer)
        return None

    def _no_call(self) -> bool:
        if not self._calls:
            return self._end("")
        place = self._buffer.find(self._close)
        if place < 0:
            return False
        self._take(place)
        return self._end(self._close)

    def _end(self, mark: str) -> bool:
        self._rest, self._buffer = self._buffer[len(mark) :], ""
        if not self._calls:
            self._events.append(NoCall(self._since + mark))
        elif self._since.strip(self._separators):
            self._events.append(NoCall(self._since))
        self._since = ""
        return False

    def _take(self, size: int) -> None:
        self._since += self._buffer[:size]
        self._buffer = self._buffer[size:]


def _literal(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    try:
        value = ast.literal_eval(text)
        as_json(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value
