"""What a key may still take: requests at once and a minute, and tokens a minute."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coserve.errors import RateLimited
from coserve.server.auth import Key

_RETRY = 1.0  # seconds, for a place that is free when a request ends: nobody knows when


@dataclass
class _Account:
    running: int = 0
    requests: float = 0.0  # left of this minute's
    tokens: float = 0.0  # left; below 0 while outputs have taken more than there was
    updated: float = 0.0


class Quotas:
    """Counts what keys with limits use. `requests_per_minute` and `tokens_per_minute` are buckets that fill
    evenly: a request is taken when it arrives, its prompt when it starts, outputs as they come. `clock` is in
    seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[bytes, _Account] = {}

    def arrival(self, key: Key | None) -> None:
        """Count one call of any kind. Raises RateLimited when the key has had its calls of this minute."""
        if key is None or not key.requests_per_minute:
            return
        account, limit = self._account(key), key.requests_per_minute
        if account.requests < 1.0:
            raise RateLimited(
                f"This API key may make {limit} requests a minute and has made them.",
                retry_after=(1.0 - account.requests) * 60.0 / limit,
                code="requests_per_minute_exceeded",
            )
        account.requests -= 1.0

    @contextlib.contextmanager
    def request(self, key: Key | None, prompt_tokens: int) -> Iterator[None]:
        """One generation of a key, for as long as it runs. Raises RateLimited when the key has no place or
        not enough tokens for the prompt; a prompt larger than the bucket wants a full one."""
        if key is None or not is_limited(key):
            yield
            return
        account = self._account(key)
        if 0 < key.max_concurrent_requests <= account.running:
            raise RateLimited(
                f"This API key has {account.running} requests under way and may have "
                f"{key.max_concurrent_requests} at once.",
                retry_after=_RETRY,
                code="concurrent_requests_exceeded",
            )
        limit = key.tokens_per_minute
        missing = min(prompt_tokens, limit) - account.tokens
        if limit and missing > 0.0:
            raise RateLimited(
                f"This API key may use {limit} tokens a minute and has {max(0, int(account.tokens))} left; "
                f"the prompt has {prompt_tokens}.",
                retry_after=missing * 60.0 / limit,
                code="tokens_per_minute_exceeded",
            )
        account.running += 1
        account.tokens -= prompt_tokens
        try:
            yield
        finally:
            account.running -= 1

    def spend(self, key: Key | None, tokens: int) -> None:
        """Tokens that were generated for a key."""
        if key is not None and key.tokens_per_minute:
            self._account(key).tokens -= tokens

    def headers(self, key: Key | None) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for a key's limits; none for a key that has none. Requests are
        those of a minute, or those at once where only they are limited."""
        if key is None or not is_limited(key):
            return {}
        account, headers = self._account(key), {}
        if key.requests_per_minute:
            limit = key.requests_per_minute
            headers["x-ratelimit-limit-requests"] = str(limit)
            headers["x-ratelimit-remaining-requests"] = str(int(account.requests))
            headers["x-ratelimit-reset-requests"] = f"{(limit - account.requests) * 60.0 / limit:.3f}s"
        elif key.max_concurrent_requests:
            left = max(0, key.max_concurrent_requests - account.running)
            headers["x-ratelimit-limit-requests"] = str(key.max_concurrent_requests)
            headers["x-ratelimit-remaining-requests"] = str(left)
        limit = key.tokens_per_minute
        if limit:
            headers["x-ratelimit-limit-tokens"] = str(limit)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(account.tokens)))
            headers["x-ratelimit-reset-tokens"] = f"{(limit - account.tokens) * 60.0 / limit:.3f}s"
        return headers

    def _account(self, key: Key) -> _Account:
        now = self._clock()
        account = self._accounts.get(key.sha256)
        if account is None:
            account = _Account(requests=key.requests_per_minute, tokens=key.tokens_per_minute, updated=now)
            self._accounts[key.sha256] = account
        minutes = (now - account.updated) / 60.0
        account.requests = min(key.requests_per_minute, account.requests + minutes * key.requests_per_minute)
        account.tokens = min(key.tokens_per_minute, account.tokens + minutes * key.tokens_per_minute)
        account.updated = now
        return account


def is_limited(key: Key) -> bool:
    """Whether a key has limits on its requests or tokens."""
    return bool(key.requests_per_minute or key.max_concurrent_requests or key.tokens_per_minute)
