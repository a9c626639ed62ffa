"""One pool of slabs that KV blocks and training activations draw on (I5: every slab has an owner).

A slab is the memory of one KV block over all layers. KV blocks take single slabs, lowest id first; training
takes *extents*, runs of neighbouring slabs, from the top. Blocks that nobody uses but that the prefix cache
still knows count as free and are taken last, least recently used first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable

from coserve.core.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` slabs; `cache` may be None (no prefix caching)."""

    def __init__(self, num_blocks: int, cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.cache = cache
        self._references = [0] * num_blocks
        self._is_blank = bytearray(b"\1") * num_blocks
        self._is_free = bytearray(b"\1") * num_blocks  # blank or idle
        self._free_heap = list(range(num_blocks))  # each block once at most; some in it may be taken
        self._in_heap = bytearray(b"\1") * num_blocks
        self._num_blank = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._extents: dict[int, int] = {}
        self._below = 0  # blocks were taken from under here
        self._above = num_blocks  # and extents from here on

    @property
    def num_free(self) -> int:
        """Slabs that can be had now: blank ones, and idle ones of the prefix cache."""
        return self._num_blank + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Unused slabs whose content the prefix cache still knows."""
        return len(self._idle)

    @property
    def num_extent_slabs(self) -> int:
        """Slabs held as activation extents."""
        return sum(self._extents.values())

    @property
    def num_kv_blocks(self) -> int:
        """Slabs in use by requests."""
        return self.num_blocks - self.num_free - self.num_extent_slabs

    @property
    def never_owned(self) -> tuple[int, int]:
        """Slabs [first, end) that no block and no extent has been in so far; empty when first >= end."""
        return self._below, self._above

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) when there are too few."""
        if count > self.num_free:
            return None
        blocks: list[int] = []
        while len(blocks) < count and self._num_blank:
            block = heapq.heappop(self._free_heap)
            self._in_heap[block] = 0
            if self._is_blank[block]:
                self._take(block, block + 1)
                blocks.append(block)
        while len(blocks) < count:
            block = next(iter(self._idle))
            self._take(block, block + 1)
            blocks.append(block)
        for block in blocks:
            self._references[block] = 1
        self._below = max(self._below, max(blocks, default=-1) + 1)
        return blocks

    def share(self, block: int) -> None:
        """One more reader of a cached block."""
        if self._references[block] == 0:
            del self._idle[block]
            self._is_free[block] = 0
        self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each. A chain's last block becomes idle, and is evicted, first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self.cache is not None and self.cache.holds(block):
                    self._idle[block] = None
                    self._is_free[block] = 1
                else:
                    self._give_back(block, block + 1)

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of these contents that the prefix cache has."""
        return set() if self.cache is None else {key for key in keys if self.cache.lookup(key) is not None}

    def forget(self, keys: Iterable[bytes]) -> None:
        """Nobody will ask for these contents again: unused blocks that hold them are blank."""
        if self.cache is None:
            return
        for key in keys:
            block = self.cache.lookup(key)
            if block is not None and block in self._idle:
                del self._idle[block]
                self.cache.remove(block)
                self._give_back(block, block + 1)

    def longest_run(self) -> int:
        """Number of slabs of the largest extent that could be reserved now."""
        return max(map(len, self._is_free.split(b"\0")))

    def reserve_extent(self, count: int) -> int | None:
        """First slab of `count` neighbouring ones, found from the top; None when no such run is free. One
        that the prefix cache knows nothing of is preferred."""
        for candidates in (self._is_blank, self._is_free):
            end = self.num_blocks
            while end >= count:
                end = candidates.rfind(b"\1", 0, end) + 1
                start = candidates.rfind(b"\0", 0, end) + 1
                if end - start >= count:
                    self._take(end - count, end)
                    self._extents[end - count] = count
                    self._above = min(self._above, end - count)
                    return end - count
                end = start
        return None

    def shrink_extent(self, start: int, count: int) -> None:
        """Keep an extent's first `count` slabs, give the others back."""
        held = self._extents[start]
        if not 0 < count <= held:
            raise ValueError(f"an extent of {held} slabs can't shrink to {count}")
        self._extents[start] = count
        self._give_back(start + count, start + held)

    def advance_extent(self, start: int, count: int) -> int:
        """Give an extent's first `count` slabs back; returns where it starts now."""
        held = self._extents[start]
        if not 0 < count < held:
            raise ValueError(f"an extent of {held} slabs can't lose its first {count}")
        del self._extents[start]
        self._extents[start + count] = held - count
        self._give_back(start, start + count)
        return start + count

    def release_extent(self, start: int) -> None:
        """Give an extent's slabs back."""
        self._give_back(start, start + self._extents.pop(start))

    def _take(self, start: int, end: int) -> None:
        """Free slabs [start, end) get an owner; what the prefix cache knew of them is forgotten."""
        blank = self._is_blank.count(1, start, end)
        if blank < end - start:
            for block in range(start, end):
                if not self._is_blank[block]:
                    del self._idle[block]
                    if self.cache is not None:
                        self.cache.remove(block)
        self._is_blank[start:end] = self._is_free[start:end] = bytes(end - start)
        self._num_blank -= blank

    def _give_back(self, start: int, end: int) -> None:
        """Slabs [start, end) are blank again."""
        self._is_blank[start:end] = self._is_free[start:end] = b"\1" * (end - start)
        self._num_blank += end - start
        block = self._in_heap.find(0, start, end)
        while block >= 0:
            self._in_heap[block] = 1
            heapq.heappush(self._free_heap, block)
            block = self._in_heap.find(0, block + 1, end)
