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
        tokens = np.arange(32 * num_words) < vocab_size
        self._model_W = np.packbits(tokens, bitorder="little").view(np.uint32)
        self._matchers: dict[str, LLMatcher] = {}

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
        """What grammars say about the rows of these requests, in this order."""
        if not self._matchers:
            return NO_MASKS
        rows = [(i, r.sequence_id) for i, r in enumerate(requests) if r.sequence_id in self._matchers]
        if not rows:
            return NO_MASKS
        matchers = [self._matchers[request_id] for _, request_id in rows]
        allowed_RW = np.zeros((len(rows), len(self._model_W)), dtype=np.uint32)
        first, size = allowed_RW.ctypes.data, self._model_W.nbytes
        for row, matcher in enumerate(matchers):
            matcher.unsafe_compute_mask_ptr(first + row * size, size)
        allowed_RW &= self._model_W
        masks = TokenMasks({}, {})
        for (place, _), matcher, allowed_W in zip(rows, matchers, allowed_RW, strict=True):
            failure = failure_of(matcher)
            if failure is None:
                masks.allowed[place] = allowed_W
            else:
                masks.failed[place] = failure
        return masks
