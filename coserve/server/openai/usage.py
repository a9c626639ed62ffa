"""`usage` of an answer, and `stream_options`: whether and where a stream carries it."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any

import msgspec

from coserve.server.application.generation import Usage
from coserve.server.fields import Fields

_PADDING = string.ascii_letters + string.digits
_PADDED_TO = 32
_encode = msgspec.json.encode


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def padded(chunk: dict[str, Any]) -> dict[str, Any]:
    """With random characters that fill it up to a multiple of 32 (and what naming them takes)."""
    missing = -len(_encode(chunk)) % _PADDED_TO
    chunk["obfuscation"] = "".join(secrets.choice(_PADDING) for _ in range(missing))
    return chunk


@dataclass(frozen=True)
class StreamOptions:
    """Whether and how an answer is streamed. Usage comes in a last chunk of its own (`include_usage`; all
    others carry null then) and, with vLLM's `continuous_usage_stats`, as counted so far in every chunk.
    `obfuscates` pads chunks, so that who sees only their sizes can't tell the tokens."""

    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    obfuscates: bool = False

    @classmethod
    def read(cls, fields: Fields, *, force_usage: bool) -> StreamOptions:
        """From a request; options without stream are refused. `force_usage`: every stream ends with it."""
        stream = fields.boolean("stream")
        options = fields.object("stream_options")
        if options is None:
            return cls(stream, stream and force_usage)
        if not stream:
            raise fields.fail("stream_options", "is only allowed with stream.")
        include = options.boolean("include_usage") or force_usage
        continuous = options.boolean("continuous_usage_stats")
        return cls(stream, include, include and continuous, options.boolean("include_obfuscation"))

    def add_usage(self, chunk: dict[str, Any], usage: Usage) -> dict[str, Any]:
        """A chunk with choices, with the `usage` that it has to carry."""
        if self.include_usage:
            chunk["usage"] = usage_body(usage) if self.continuous_usage else None
        return chunk

    def ready(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chunks as they go out."""
        return [padded(chunk) for chunk in chunks] if self.obfuscates else chunks

    def last(self, chunk: dict[str, Any], usage: Usage) -> dict[str, Any]:
        """The chunk without choices that tells the whole usage."""
        return {**chunk, "usage": usage_body(usage)}
