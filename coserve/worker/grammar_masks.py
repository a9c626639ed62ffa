"""Which tokens grammars allow next: one matcher a request, and a mask for each row that is about to sample.

Filling lets other threads run. On a GPU it happens while the forward is on its way; on a CPU, whose cores the
forward wants itself, right after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher

from coserve.core.request import Request
from coserve.errors import InvalidRequest
from coserve.grammar import failure_of


@dataclass(frozen=True)
class TokenMasks:
    """By place in the batch: the tokens that grammars ban from rows (bool [V] on the CPU, never all of them),
    and why a row can't get a token at all."""

    banned: dict[int, torch.Tensor] = field(default_factory=dict)
    failed: dict[int, InvalidRequest] = field(default_factory=dict)


NO_MASKS = TokenMasks()


class GrammarMasks:
    """The matchers of all requests with a grammar, from their start to their end.

    The library's masks have `num_words` int32 words, of which the model's `vocab_size` bits count.
    """

    def __init__(self, vocab_size: int, num_words: int) -> None:
        self._vocab_size = vocab_size
        self._num_words = num_words
        self._executor = LLExecutor()
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
        bits_RW = np.zeros((len(rows), self._num_words), dtype=np.int32)
        numbered = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(numbered, bits_RW.ctypes.data, 4 * self._num_words, len(rows))
        bytes_RB = (~bits_RW).view(np.uint8)
        banned_RV = np.unpackbits(bytes_RB, axis=1, count=self._vocab_size, bitorder="little")
        masks = TokenMasks({}, {})
        for (place, _), matcher, banned_V in zip(rows, matchers, banned_RV, strict=True):
            failure = failure_of(matcher)
            if failure is None:
                masks.banned[place] = torch.from_numpy(banned_V.view(np.bool_))
            else:
                masks.failed[place] = failure
        return masks
