"""Log-probabilities in the forms of the chat, completions and prompt_logprobs answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coserve.engine.messages import TokenLogprobs
from coserve.tokenizer import Tokenizer

_FLOOR = -9999.0


def _finite(logprob: float) -> float:
    """JSON has no -inf: a token that can't come gets OpenAI's -9999."""
    return max(logprob, _FLOOR) if math.isfinite(logprob) else _FLOOR


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode("utf-8", errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """Chat's `logprobs` object: one entry a token, with its `top` alternatives."""
    content = []
    for entry in logprobs:
        token = _chat_token(tokenizer, entry.token_id, entry.logprob)
        token["top_logprobs"] = [_chat_token(tokenizer, *pair) for pair in entry.top[:top]]
        content.append(token)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    logprobs: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    offset: int,
    top: int,
) -> dict[str, Any]:
    """Completions' `logprobs` object: parallel lists; None entries (the first prompt token) stay null.

    `offset` is the length of the text before the first token.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        text = tokenizer.token_text(token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _top_map(tokenizer, entry, top))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _top_map(tokenizer: Tokenizer, entry: TokenLogprobs, top: int) -> dict[str, float]:
    pairs = [*entry.top[:top], (entry.token_id, entry.logprob)]
    found: dict[str, float] = {}
    for token_id, logprob in pairs:
        found.setdefault(tokenizer.token_text(token_id), _finite(logprob))
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
