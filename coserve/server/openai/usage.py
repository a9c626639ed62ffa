"""`usage` of an answer, and `stream_options`: whether and where a stream carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coserve.server.application.generation import Usage
from coserve.server.fields import Fields


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@dataclass(frozen=True)
class StreamOptions:
    """Whether and how an answer is streamed. Usage comes in a last chunk of its own (`include_usage`; all
    others carry null then) and, with vLLM's `continuous_usage_stats`, as counted so far in every chunk."""

    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False

    @classmethod
    def read(cls, fields: Fields) -> StreamOptions:
        """From a request; options without stream are refused."""
        stream = fields.boolean("stream")
        options = fields.object("stream_options")
        if options is None:
            return cls(stream)
        if not stream:
            raise fields.fail("stream_options", "is only allowed with stream.")
        include = options.boolean("include_usage")
        return cls(stream, include, include and options.boolean("continuous_usage_stats"))

    def add_usage(self, chunk: dict[str, Any], usage: Usage) -> dict[str, Any]:
        """A chunk with choices, with the `usage` it has to carry."""
        if self.include_usage:
            chunk["usage"] = usage_body(usage) if self.continuous_usage else None
        return chunk
