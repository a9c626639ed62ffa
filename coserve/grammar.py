"""What constrained output has to match: grammars over a model's vocabulary, by llguidance. Free of torch.

A grammar is a text: a Lark grammar, or the JSON of several, as the library's `grammar_from_...` write it. The
server checks it without a vocabulary (`check_grammar`), the engine compiles it for the model's
(`GrammarVocabulary.compile`). Both may take a while, let other threads run, and want a deep stack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from coserve.errors import ConfigError, InvalidRequest
from coserve.tokenizer import Tokenizer

_T = TypeVar("_T")
_stack_size_changes = threading.Lock()  # the size is the process's for the threads it starts next

MAX_GRAMMAR_BYTES = 128 * 2**10
_SHOWN = 300
_DEEP_STACK = 256 * 2**20  # bytes of address space, used as far as a grammar's nesting needs them

# What one grammar may cost: tens of milliseconds to compile, a few for a token, an automaton of 40 MB. One
# that asks for more is refused, or ends in an error where it gets there.
_LIMITS = LLParserLimits(
    max_items_in_row=10_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class DeepThreads:
    """Threads to read grammars in, started with the first one.

    The library follows a chain of rules or references by calling itself: on an ordinary stack of 8 MB one
    of some thousand links, 100 kB of text, ends the process. Here there is room for whatever
    MAX_GRAMMAR_BYTES can hold.
    """

    def __init__(self, count: int, name: str, initializer: Callable[[], None] = lambda: None) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=initializer)
        self._count = count

    def submit(self, work: Callable[..., _T], *arguments: object) -> Future[_T]:
        """Have `work` done by the next thread that is free."""
        if self._count:
            self._start(self._count)
            self._count = 0
        return self._pool.submit(work, *arguments)

    def _start(self, count: int) -> None:
        started = threading.Barrier(count + 1)
        with _stack_size_changes:
            before = threading.stack_size(_DEEP_STACK)
            for _ in range(count):
                self._pool.submit(started.wait)
            threading.stack_size(before)
        started.wait()

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_grammar(grammar: str, param: str = "grammar") -> None:
    """Raise InvalidRequest, saying why, unless `grammar` is one and small enough. Wants `DeepThreads`."""
    size = len(grammar.encode("utf-8", errors="replace"))
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"{param} makes a grammar of {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed.", param=param
        )
    refused, reasons = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=_LIMITS)
    if refused:
        raise InvalidRequest(f"{param} can't be used: {_short(' '.join(reasons))}", param=param)


def failure_of(matcher: LLMatcher) -> InvalidRequest:
    """Why a matcher that is in an error can't go on: its grammar asked for more than the limits."""
    return InvalidRequest(
        f"The grammar became too complex to follow: {_short(matcher.get_error())}", param="grammar"
    )


class GrammarVocabulary:
    """A model's tokens as bytes: what its grammars are compiled for.

    Masks have `num_words` uint32 words with a bit for each token id, 1 where it is allowed; an id that the
    tokenizer doesn't know never is. Making a vocabulary holds the interpreter's lock, a second for 150,000
    tokens: it is done before there are requests.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        """`vocab_size` and `end_ids`, the tokens that end an output, are the model's. Raises ValueError where
        there is no end token or tokens aren't byte strings."""
        known = max(vocab_size, tokenizer.id_limit)
        ends = [token for token in end_ids if token < vocab_size]
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=known, eos_token=ends)
        self.num_words = -(-known // 32)

    @classmethod
    def from_dir(cls, path: str | Path, vocab_size: int, end_ids: Sequence[int]) -> GrammarVocabulary | None:
        """That of a model directory; None where the model can't be held to a grammar: it has no end token, or
        no tokenizer, or one whose tokens aren't byte strings."""
        try:
            return cls(Tokenizer.from_dir(path), vocab_size, end_ids)
        except (ConfigError, ValueError):
            return None

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's start; outputs are followed by copies of it, which share its automaton.

        Raises InvalidRequest for what isn't a grammar, or can't be followed from its first tokens on. Wants
        `DeepThreads`.
        """
        check_grammar(grammar)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        probe = matcher.deep_copy()
        for _ in range(2):
            allowed = np.frombuffer(probe.compute_bitmask(), dtype=np.uint8)
            if probe.is_error():
                raise failure_of(probe)
            byte = int(allowed.nonzero()[0][0])
            probe.consume_token(8 * byte + (int(allowed[byte]) & -int(allowed[byte])).bit_length() - 1)
        return matcher


def _short(reason: str) -> str:
    """The library's reason without its backtraces and its position marks, on one line."""
    lines = reason.partition("<backtrace>")[0].split("\n")
    text = " ".join(line.strip() for line in lines if line.strip(" |^-"))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
