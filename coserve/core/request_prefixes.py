"""Requests that begin alike share the blocks of what they have in common."""

from __future__ import annotations

from coserve.core.block_pool import BlockPool
from coserve.core.prefix_cache import block_key, root_key
from coserve.core.request import Request


class RequestPrefixes:
    """Finds a request's prefix among the cached blocks, and remembers the blocks that it fills. `queries` are
    the tokens of requests that asked, `hits` those of them that were found."""

    def __init__(self, blocks: BlockPool, block_size: int) -> None:
        self.queries = 0
        self.hits = 0
        self._blocks = blocks
        self._size = block_size

    def match(self, request: Request) -> None:
        """Share the longest cached run of full blocks, leaving at least one token to compute."""
        if self._is_in_use(request):
            for block in self._found(request):
                self._blocks.share(block)
                request.block_table.append(block)
            request.cursor = len(request.block_table) * self._size

    def cached_tokens(self, request: Request) -> int:
        """Tokens of a request that are cached now; nothing is shared yet."""
        return len(self._found(request)) * self._size if self._is_in_use(request) else 0

    def count(self, request: Request) -> None:
        """A request begins with what was found."""
        if self._blocks.cache is not None:
            request.num_cached_tokens = request.cursor
            self.queries += request.num_tokens
            self.hits += request.cursor

    def remember(self, request: Request, start: int) -> None:
        """Blocks that became full with the tokens from `start` to the request's cursor."""
        cache, size = self._blocks.cache, self._size
        if cache is None or request.cursor // size == start // size:
            return
        for index in range(start // size, request.cursor // size):
            block = request.block_table[index]
            if not cache.holds(block):
                cache.insert(self._key(request, index), block)

    def _is_in_use(self, request: Request) -> bool:
        """Who wants its prompt's log-probabilities computes all of it."""
        return self._blocks.cache is not None and request.sampling.prompt_logprobs is None

    def _found(self, request: Request) -> list[int]:
        cache, found = self._blocks.cache, []
        assert cache is not None
        for index in range((request.num_tokens - 1) // self._size):
            block = cache.lookup(self._key(request, index))
            if block is None:
                break
            found.append(block)
        return found

    def _key(self, request: Request, index: int) -> bytes:
        """Key of the request's block `index`, extending the request's chain as needed."""
        hashes, size = request.block_hashes, self._size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else root_key(request.adapter, request.cache_salt)
            hashes.append(block_key(parent, request.token_ids[start : start + size]))
        return hashes[index]
