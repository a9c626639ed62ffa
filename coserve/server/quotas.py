"""What a key may still take: requests at once, and tokens a minute."""

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
    requests: int = 0
    tokens: float = 0.0  # left; below 0 while outputs have taken more than there was
    updated: float = 0.0


class Quotas:
    """Counts what keys with limits use. Tokens are a bucket of `tokens_per_minute` that fills evenly: prompts
    are taken at the start, outputs as they come. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextlib.contextmanager
    def request(self, key: Key | None, prompt_tokens: int) -> Iterator[None]:
        """One request of a key, for as long as it runs. Raises RateLimited when the key has no place or not
        enough tokens for the prompt; a prompt larger than the bucket wants a full one."""
        if key is None or not is_limited(key):
            yield
            return
        account = self._account(key)
        if 0 < key.max_concurrent_requests <= account.requests:
            raise RateLimited(
                f"This API key has {account.requests} requests under way and may have "
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
        account.requests += 1
        account.tokens -= prompt_tokens
        try:
            yield
        finally:
            account.requests -= 1

    def spend(self, key: Key | None, tokens: int) -> None:
        """Tokens that were generated for a key."""
        if key is not None and key.tokens_per_minute:
            self._account(key).tokens -= tokens

    def headers(self, key: Key | None) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for a key's limits; none for a key that has none."""
        if key is None or not is_limited(key):
            return {}
        account, headers = self._account(key), {}
        if key.max_concurrent_requests:
            left = max(0, key.max_concurrent_requests - account.requests)
            headers["x-ratelimit-limit-requests"] = str(key.max_concurrent_requests)
            headers["x-ratelimit-remaining-requests"] = str(left)
        limit = key.tokens_per_minute
        if limit:
            headers["x-ratelimit-limit-tokens"] = str(limit)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(account.tokens)))
            headers["x-ratelimit-reset-tokens"] = f"{(limit - account.tokens) * 60.0 / limit:.3f}s"
        return headers

    def _account(self, key: Key) -> _Account:
        now, limit = self._clock(), key.tokens_per_minute
        account = self._accounts.get(key.tenant)
        if account is None:
            account = self._accounts[key.tenant] = _Account(tokens=limit, updated=now)
        account.tokens = min(limit, account.tokens + (now - account.updated) * limit / 60.0)
        account.updated = now
        return account


def is_limited(key: Key) -> bool:
    """Whether a key has limits."""
    return bool(key.max_concurrent_requests or key.tokens_per_minute)
