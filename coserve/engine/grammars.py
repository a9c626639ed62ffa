"""Grammars of requests: compiled in threads while the requests wait, kept for the next who bring them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future

from llguidance import LLMatcher

from coserve.core.request import Request
from coserve.errors import CoserveError, InternalError, InvalidRequest
from coserve.grammar import DeepThreads, GrammarVocabulary
from coserve.worker.grammar_masks import GrammarMasks

THREADS = 2
KEPT = 64  # compiled grammars; an automaton may grow to 40 MB, a schema's has some hundred kB
NICENESS = 5  # of the threads: a step's kernels go first


class Grammars:
    """From a request's grammar to a matcher in `masks`, without holding a step up."""

    def __init__(self, vocabulary: GrammarVocabulary | None, masks: GrammarMasks) -> None:
        self._vocabulary = vocabulary
        self._masks = masks
        self._threads = DeepThreads(THREADS, "grammar", _step_back)
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._compiling: dict[str, tuple[Future[LLMatcher], list[Request]]] = {}

    @property
    def is_compiling(self) -> bool:
        """Somebody waits for a grammar."""
        return bool(self._compiling)

    def check(self, request: Request) -> None:
        """Raise InvalidRequest for a grammar where the model's tokens can't be held to one."""
        if request.sampling.grammar and self._vocabulary is None:
            raise InvalidRequest(
                "This model's output can't be constrained: it has no end token, no tokenizer, or one whose "
                "tokens aren't byte strings.",
                param="grammar",
            )

    def add(self, request: Request) -> None:
        """Have a queued request's grammar compiled, unless it is known; until then it waits."""
        grammar = request.sampling.grammar
        known = self._kept.get(grammar)
        if known is not None:
            self._kept.move_to_end(grammar)
            self._begin(request, known)
        elif grammar in self._compiling:
            self._compiling[grammar][1].append(request)
        elif grammar:
            assert self._vocabulary is not None
            self._compiling[grammar] = (self._threads.submit(self._vocabulary.compile, grammar), [request])

    def poll(self) -> list[tuple[Request, CoserveError]]:
        """Let those go on whose grammar is compiled; returns those whose grammar is none, with the reason."""
        refused: list[tuple[Request, CoserveError]] = []
        for grammar, (future, requests) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[grammar]
            waiting = [request for request in requests if not request.finished]
            error = future.exception()
            if error is None:
                matcher = self._kept[grammar] = future.result()
                for request in waiting:
                    self._begin(request, matcher)
            else:
                if not isinstance(error, CoserveError):
                    error = InternalError("The grammar could not be compiled.")
                refused += [(request, error) for request in waiting]
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return refused

    def drop(self, request: Request) -> None:
        """A request's grammar became too complex. Copies share their automaton: the next begins anew."""
        self._kept.pop(request.sampling.grammar, None)

    def close(self) -> None:
        """Compile no more."""
        self._threads.close()

    def _begin(self, request: Request, matcher: LLMatcher) -> None:
        self._masks.begin(request, matcher.deep_copy())
        request.awaits_grammar = False


def _step_back() -> None:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
