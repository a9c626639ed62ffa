"""Calls after Mistral's [TOOL_CALLS]: a JSON list, or since v11 NAME{...} or NAME[ARGS]{...}."""

from __future__ import annotations

import re

from coserve.server.application.tool_calling.events import Arguments, Event, NoCall, Opened
from coserve.server.application.tool_calling.json_reader import JsonReader, JsonScan

_HEAD = re.compile(r"\s*([^\s\[\]{}\"]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_HEAD_BEGUN = re.compile(r"\s*(?:[^\s\[\]{}\"]+(?:\[[\w\[\]]*)?\s*)?")
_LONGEST_HEAD = 512


class MistralReader:
    """Looks at the first character for which form it is. A named call ends with its arguments; the next has
    a mark of its own."""

    def __init__(self, opening: str) -> None:
        self._opening = opening
        self._buffer = ""
        self._json: JsonReader | None = None
        self._scan: JsonScan | None = None

    @property
    def open(self) -> bool:
        return self._json.open if self._json is not None else self._scan is not None

    @property
    def held(self) -> int:
        if self._json is not None:
            return self._json.held
        return 0 if self._scan is not None else len(self._opening) + len(self._buffer)

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        if self._json is not None:
            return self._json.feed(text)
        if self._scan is not None:
            return self._arguments([], text)
        self._buffer += text
        if self._buffer.lstrip()[:1] in ("[", "{"):
            self._json = JsonReader(self._opening, "", None)
            return self._json.feed(self._buffer)
        head = _HEAD.match(self._buffer, 0, _LONGEST_HEAD)
        if head is not None:
            self._scan = JsonScan()
            return self._arguments([Opened(head.group(1))], self._buffer[head.end() :])
        if len(self._buffer) < _LONGEST_HEAD and _HEAD_BEGUN.fullmatch(self._buffer):
            return [], None
        return [NoCall(self._opening)], self._buffer

    def _arguments(self, events: list[Event], text: str) -> tuple[list[Event], str | None]:
        assert self._scan is not None
        end = self._scan.feed(text)
        said = text if end is None else text[:end]
        if said:
            events.append(Arguments(said))
        if end is None:
            return events, None
        self._scan = None
        return events, text[end:]

    def finish(self) -> list[Event]:
        if self._json is not None:
            return self._json.finish()
        return [] if self._scan is not None else [NoCall(self._opening + self._buffer)]
