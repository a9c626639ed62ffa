"""Log-probabilities in the forms of the chat, completions and prompt_logprobs answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from coserve.engine.messages import TokenLogprobs
from coserve.tokenizer import Tokenizer

_FLOOR = -9999.0


class TokenNames:
    """How tokens are written in log-probabilities: as text, or as `token_id:ID`, which never loses one."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    """JSON has no -inf: a token that can't come gets OpenAI's -9999."""
    return max(logprob, _FLOOR) if math.isfinite(logprob) else _FLOOR


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    raw = names.tokenizer.token_bytes(token_id)
    return {"token": names(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


def chat_logprobs(names: TokenNames, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Chat's `logprobs` object: one entry a token, with its alternatives."""
    content = []
    for entry in logprobs:
        token = _chat_token(names, entry.token_id, entry.logprob)
        token["top_logprobs"] = [_chat_token(names, *pair) for pair in entry.top]
        content.append(token)
    return {"content": content, "refusal": None}


def completion_logprobs(
    names: TokenNames, logprobs: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int
) -> dict[str, Any]:
    """Completions' `logprobs` object: parallel lists; None entries (the first prompt token) stay null.

    `offset` is the length of the text before the first token.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        tokens.append(names(token_id))
        offsets.append(offset)
        offset += text_length(names, [token_id])
        values.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _top_map(names, entry))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def trimmed(logprobs: Sequence[TokenLogprobs | None], top: int) -> list[TokenLogprobs | None]:
    """The same with at most `top` alternatives each."""
    return [
        entry if entry is None or len(entry.top) <= top else replace(entry, top=entry.top[:top])
        for entry in logprobs
    ]


def text_length(names: TokenNames, token_ids: Sequence[int]) -> int:
    """Characters of tokens, each on its own, as `text_offset` counts them."""
    return sum(len(names.tokenizer.token_text(token_id)) for token_id in token_ids)


def _top_map(names: TokenNames, entry: TokenLogprobs) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        found.setdefault(names(token_id), _finite(logprob))
    return found


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs | None] | None
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per prompt token a map of token id to logprob, rank and text."""
    if logprobs is None:
        return None
    return [None if entry is None else _prompt_entry(tokenizer, entry) for entry in logprobs]


def _prompt_entry(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, Any]:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in ranked
    }
