"""Which tokens grammars allow next: one matcher a request, and a mask for each row that is about to sample.

Filling lets other threads run. On a GPU it happens while the forward is on its way; on a CPU, whose cores the
forward wants itself, right after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLMatcher

from coserve.core.request import Request
from coserve.errors import InvalidRequest
from coserve.grammar import failure_of


@dataclass(frozen=True)
class TokenMasks:
    """By place in the batch: the tokens that grammars allow rows (uint32 [W], a bit each, never none), and
    why a row can't get a token at all."""

    allowed: dict[int, np.ndarray] = field(default_factory=dict)
    failed: dict[int, InvalidRequest] = field(default_factory=dict)


NO_MASKS = TokenMasks()


class GrammarMasks:
    """The matchers of all requests with a grammar, from their start to their end.

    Masks have `num_words` words of 32 bits, of which the first `vocab_size` bits are the model's tokens.
    """

    def __init__(self, vocab_size: int, num_words: int) -> None:
        self._num_words = num_words
        self._model_words = -(-vocab_size // 32)
        self._last_word = np.uint32((1 << (vocab_size - 1) % 32 + 1) - 1)
        self._matchers: dict[str, LLMatcher] = {}
        self._rows: list[tuple[int, np.ndarray]] = []  # of masks, to be filled anew: where it is, and the row

    def begin(self, request: Request, matcher: LLMatcher) -> None:
        """Follow a request's output with a matcher of its own, which has seen nothing of it."""
        self._matchers[request.sequence_id] = matcher

    def advance(self, request: Request, token_id: int) -> None:
        """The request goes on with a token that its mask allowed."""
        matcher = self._matchers.get(request.sequence_id)
        if matcher is not None:
            matcher.consume_token(token_id)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._matchers.pop(request.sequence_id, None)

    def fill(self, requests: Sequence[Request]) -> TokenMasks:
        """What grammars say about the rows of these requests, in this order; good until the next call."""
        if not self._matchers:
            return NO_MASKS
        masks, filled = TokenMasks({}, {}), 0
        for place, request in enumerate(requests):
            matcher = self._matchers.get(request.sequence_id)
            if matcher is None:
                continue
            if filled == len(self._rows):
                rows_RW = np.empty((8, self._num_words), dtype=np.uint32)
                self._rows += [(row_W.ctypes.data, row_W[: self._model_words]) for row_W in rows_RW]
            address, row_W = self._rows[filled]
            filled += 1
            matcher.unsafe_compute_mask_ptr(address, 4 * self._num_words)
            if matcher.is_error():
                masks.failed[place] = failure_of(matcher)
            else:
                row_W[-1] &= self._last_word
                masks.allowed[place] = row_W
        return masks
