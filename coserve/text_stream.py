"""Text that arrives token by token: incremental detokenisation and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"
# No UTF-8 character spans more bytes; an undecodable tail of more tokens than this is garbage and is let go.
_MAX_HELD_TOKENS = 8


class BytesDecoder:
    """Streams a tokenizer whose tokens are byte strings; O(1) a token.

    `token_bytes(id)` gives a token's bytes. `strip_space` drops one leading space of the whole text
    (SentencePiece puts one in front of everything it encodes).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = strip_space
        self._is_whole = True  # no character has begun and not ended

    def push(self, token_id: int) -> str:
        """Take a token; returns the whole characters that are certain now."""
        data = self._token_bytes(token_id)
        if self._is_whole and data.isascii():
            text = data.decode("ascii")
        else:
            text = self._utf8.decode(data)
            self._is_whole = not self._utf8.getstate()[0]
        return self._shown(text) if self._strip_space else text

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


class WindowDecoder:
    """Streams any other tokenizer by decoding a short window of tokens before and after the new one.

    Text is emitted once the window's decoding no longer ends in an incomplete character. The window moves on
    with each emission, so the cost of a token doesn't grow with the output.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        """Take a token; returns the whole characters that are certain now."""
        self._window.append(token_id)
        return self._emit(final=len(self._window) - self._read > _MAX_HELD_TOKENS)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._decode(self._window[: self._read])
        after = self._decode(self._window)
        if not final and (after.endswith(_REPLACEMENT) or len(after) <= len(before)):
            return ""
        # The tokens just emitted stay as context: some decoders join words by what comes before.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return after[len(before) :]


class IncrementalDecoder:
    """Token ids in, text out, never part of a UTF-8 character.

    The pieces joined (with `finish()`'s last one) equal the tokenizer's decoding of all the ids. Ids in
    `hidden` (the special tokens, when these are skipped) give no text.
    """

    def __init__(self, decoder: BytesDecoder | WindowDecoder, hidden: frozenset[int]) -> None:
        self._decoder = decoder
        self._hidden = hidden

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that has become certain with these tokens; may be empty."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._hidden:
                text += self._decoder.push(token_id)
        return text

    def finish(self) -> str:
        """What was held back, incomplete characters replaced by U+FFFD. Call once, at the end."""
        return self._decoder.finish()


class StopChecker:
    """Cuts streamed text at the first stop string and holds back what may turn out to begin one.

    The stop whose last character comes first wins (of several, the longest), so the result does not depend
    on how the text was cut into pieces. With `include_stop` the stop string itself is part of the text.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text to show now, the stop string that ended it or None). Nothing is shown after a stop."""
        if not self._stops:
            return text, None
        if self.stopped_by is not None:
            return "", self.stopped_by
        buffer = self._held + text
        found = [
            (start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0
        ]
        if found:
            end, start, self.stopped_by = min(found)
            self._held = ""
            return buffer[: end if self._include_stop else start], self.stopped_by
        keep = self._longest_begun_stop(buffer)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """The held-back text, at an end that no stop string caused."""
        held, self._held = self._held, ""
        return held

    def _longest_begun_stop(self, buffer: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
