"""Splits generated text into content and tool calls, as it comes."""

from __future__ import annotations

from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Piece
from coserve.server.application.tool_calling.events import Arguments, Event, NoCall, Opened, Reader, begun
from coserve.server.application.tool_calling.formats import Schemas, ToolFormat


class ToolCallParser:
    """Content and calls of one answer, written in `form`.

    Text that may turn out to open a call is held back. What turns out to be no call is content, so that
    nothing the model said is lost; only white space beside calls is. `limit` bounds the calls kept (1
    without parallel calls); further ones are dropped.
    """

    def __init__(self, form: ToolFormat, schemas: Schemas, limit: int | None = None) -> None:
        self._form = form
        self._schemas = schemas
        self._limit = limit
        self._buffer = ""
        self._space = ""  # white space after content, dropped where a call follows
        self._block: Reader | None = None
        self._said = False
        self._at_start = bool(form.bare)
        self._opened = 0
        self._pieces: list[Piece] = []
        self.cut = False

    @property
    def calls(self) -> int:
        """Calls given so far."""
        return self._opened if self._limit is None else min(self._opened, self._limit)

    @property
    def held(self) -> int:
        """Characters at the end of what was fed about which nothing is decided yet."""
        return len(self._space) + len(self._buffer) + (self._block.held if self._block is not None else 0)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        self._buffer += text
        while self._inside() if self._block is not None else self._outside():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the output. `cut` says whether a call was going on."""
        if self._block is not None:
            self.cut = self._block.open
            self._take(self._block.finish())
            self._block = None
        else:
            self._content(self._buffer)
        self._buffer = ""
        if self._space and not self._opened:
            self._pieces.append(Content(self._space))
        self._space = ""
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _outside(self) -> bool:
        """Take text up to the next block; says whether one begins."""
        if self._at_start and (first := self._buffer.lstrip()[:1]):
            self._at_start = False
            if first in self._form.bare:
                self._block = self._form.reader(None, self._schemas)
                return True
        if self._at_start and not self._buffer.strip():
            return False
        found = [
            (place, block) for block in self._form.blocks if (place := self._buffer.find(block.open)) >= 0
        ]
        if found:
            place, block = min(found, key=lambda hit: hit[0])
            self._content(self._buffer[:place])
            self._buffer = self._buffer[place + (0 if block.kept else len(block.open)) :]
            self._block = self._form.reader(block, self._schemas)
            return True
        cut = len(self._buffer) - max((begun(self._buffer, b.open) for b in self._form.blocks), default=0)
        self._content(self._buffer[:cut])
        self._buffer = self._buffer[cut:]
        return False

    def _inside(self) -> bool:
        """Hand text to the block's reader; says whether the block has ended."""
        assert self._block is not None
        text, self._buffer = self._buffer, ""
        events, rest = self._block.feed(text)
        self._take(events)
        if rest is None:
            return False
        self._block, self._buffer = None, rest
        return True

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, NoCall):
                self._content(event.text)
                continue
            if isinstance(event, Opened):
                self._opened += 1
                self._space = ""
            index = self._opened - 1
            if self._limit is not None and index >= self._limit:
                continue
            if isinstance(event, Opened):
                self._pieces.append(CallOpened(index, self._form.new_id(), event.name))
            elif isinstance(event, Arguments):
                self._pieces.append(CallArguments(index, event.text))

    def _content(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._pieces.append(Content(shown if self._said or not self._opened else shown.lstrip()))
            self._said = True
