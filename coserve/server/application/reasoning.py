"""What a model thinks before it answers: <think>...</think>, taken apart from the answer as it comes."""

from __future__ import annotations

from dataclasses import dataclass

from coserve.errors import ConfigError
from coserve.server.application.answer_pieces import Content, Piece, Reasoning
from coserve.server.application.tool_calling.events import begun


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around a model's reasoning. `assumed`: an answer begins inside, also without the first."""

    open: str = "<think>"
    close: str = "</think>"
    assumed: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.open, self.close)


_THINK = ReasoningFormat()
_FORMATS = {
    "qwen3": _THINK,
    "deepseek_r1": ReasoningFormat(assumed=True),
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "olmo3": _THINK,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}
PARSERS = ("auto", "none", *_FORMATS)


def choose(parser: str, template: str | None) -> ReasoningFormat | None:
    """The format of a `--reasoning-parser`: by vLLM's name, none, or ("auto") by the template's marks.

    Raises ConfigError for an unknown name.
    """
    if parser == "none":
        return None
    if parser != "auto":
        if parser not in _FORMATS:
            raise ConfigError(
                f"--reasoning-parser {parser!r} is unknown; take one of {', '.join(PARSERS)}",
                param="reasoning_parser",
            )
        return _FORMATS[parser]
    for form in (_THINK, _FORMATS["mistral"]):
        if template is not None and form.close in template:
            return form
    return None


def begins_inside(form: ReasoningFormat, prompt: str, continued: str) -> bool | None:
    """Whether the answer to a rendered prompt begins within reasoning; None: the prompt has ended it.

    `continued` is the text of the message that the answer goes on with, if it does.
    """
    if continued:
        return continued.rfind(form.open) > continued.rfind(form.close)
    end = prompt[-200:].rstrip()
    if end.endswith(form.close):
        return None
    return form.assumed or end.endswith(form.open)


class ReasoningParser:
    """Splits an answer into reasoning and the rest.

    Line breaks just inside the marks and after the last one are layout and dropped. What follows the
    reasoning goes on as content, never searched again.
    """

    def __init__(self, form: ReasoningFormat, inside: bool) -> None:
        self._form = form
        self._state = self._inside if inside else self._start
        self._buffer = ""
        self._said = False
        self._opened = not inside

    @property
    def held(self) -> int:
        """Characters about which nothing is decided yet."""
        return len(self._buffer)

    @property
    def undecided(self) -> bool:
        """Whether the text so far may begin with reasoning or not."""
        return self._state == self._start

    @property
    def thinking(self) -> bool:
        """Whether the text is reasoning at this place."""
        return self._state == self._inside

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._state(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the output."""
        left, self._buffer = self._buffer, ""
        if self._state == self._inside:
            left = left.rstrip("\n")
            return [Reasoning(left)] if left else []
        return [Content(left)] if left and self._state == self._start else []

    def _start(self, pieces: list[Piece]) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(self._form.open):
            self._buffer = text[len(self._form.open) :]
            self._state, self._opened = self._inside, True
            return True
        if self._form.open.startswith(text):
            return False
        self._state, self._said = self._after, True
        return True

    def _inside(self, pieces: list[Piece]) -> bool:
        if not self._said:
            self._buffer = self._buffer.lstrip("\n")
        if not self._opened:  # the mark may come, also where it was assumed or the prompt had it
            if self._form.open.startswith(self._buffer):
                return False
            self._opened = True
            self._buffer = self._buffer.removeprefix(self._form.open).lstrip("\n")
        place = self._buffer.find(self._form.close)
        end = place if place >= 0 else len(self._buffer) - begun(self._buffer, self._form.close)
        text = self._buffer[:end].rstrip("\n")
        if text:
            pieces.append(Reasoning(text))
            self._said = True
        if place < 0:
            self._buffer = self._buffer[len(text) :]
            return False
        self._buffer = self._buffer[place + len(self._form.close) :]
        self._state, self._said = self._after, False
        return True

    def _after(self, pieces: list[Piece]) -> bool:
        if not self._said:
            self._buffer = self._buffer.lstrip("\n")
        if self._buffer:
            pieces.append(Content(self._buffer))
            self._buffer, self._said = "", True
        return False
