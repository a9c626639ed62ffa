"""A sample's outputs as deltas of text: whole characters, stop strings, several tokens together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coserve.engine.messages import RequestOutput, TokenLogprobs
from coserve.server.application.sampling import SamplingRequest
from coserve.tokenizer import StopChecker, Tokenizer


class Delta(msgspec.Struct, frozen=True):
    """What became known of one sample: text ready to show, the tokens behind it, and maybe its end.

    `finish_reason` is "stop" or "length" on a sample's last delta; `stop_reason` the stop string or token id.
    `snapshot` comes with the first of a live adapter: the job and the step that it reads. `held` counts the
    characters of these tokens that come with a later delta.
    """

    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    snapshot: str | None = None
    held: int = 0

    def joined(self, later: Delta) -> Delta:
        """This one and the one after it."""
        return Delta(
            index=self.index,
            text=self.text + later.text,
            token_ids=[*self.token_ids, *later.token_ids],
            logprobs=[*self.logprobs, *later.logprobs],
            prompt_logprobs=self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs,
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
            cached_tokens=max(self.cached_tokens, later.cached_tokens),
            snapshot=self.snapshot or later.snapshot,
            held=later.held,
        )


class TextStream:
    """Turns a sample's engine outputs into deltas: decoding, stop strings, the end token's text."""

    def __init__(self, tokenizer: Tokenizer, request: SamplingRequest) -> None:
        self._decoder = tokenizer.incremental_decoder(
            request.skip_special_tokens, continues_text=True, shown=request.shown_token_ids
        )
        self._stops = StopChecker(request.stop, request.include_stop)
        self._keep_stop_token = request.include_stop

    def delta(self, index: int, output: RequestOutput) -> Delta:
        """What one output adds to the sample of this index."""
        shown = output.token_ids
        ended_by_token = output.finish_reason == "stop" and output.stop_token_id is not None
        if ended_by_token and not self._keep_stop_token and shown and shown[-1] == output.stop_token_id:
            shown = shown[:-1]
        decoded = self._decoder.push(shown)
        if output.finish_reason is not None:
            decoded += self._decoder.finish()
        text, stopped_by = self._stops.feed(decoded)
        reason: str | None = output.finish_reason
        stop_reason: str | int | None = None
        if stopped_by is not None:
            reason, stop_reason = "stop", stopped_by
        elif reason is not None:
            text += self._stops.flush()
            stop_reason = output.stop_token_id if ended_by_token else None
        return Delta(
            index=index,
            text=text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            cached_tokens=output.cached_tokens,
            snapshot=output.snapshot,
            held=self._stops.held,
        )


class Chunks:
    """Joins deltas to ones of `interval` tokens; the first and the last go at once."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: Delta | None = None
        self._is_first = True

    def take(self, delta: Delta) -> list[Delta]:
        """What goes out now."""
        if self._interval == 1:
            return [delta]
        if self._held is not None:
            delta = self._held.joined(delta)
        is_due = self._is_first or delta.finish_reason is not None or len(delta.token_ids) >= self._interval
        self._held = None if is_due else delta
        self._is_first = False
        return [delta] if is_due else []
