"""One pool of slabs that KV blocks and training activations draw on (I5: every slab has an owner).

A slab is the memory of one KV block over all layers. KV blocks take single slabs, lowest id first; training
takes *extents*, runs of neighbouring slabs, from the top. Blocks that nobody uses but that the prefix cache
still knows count as free and are taken last, least recently used first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from coserve.core.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` slabs; `cache` may be None (no prefix caching)."""

    def __init__(self, num_blocks: int, cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.cache = cache
        self._references = [0] * num_blocks
        self._is_free = [True] * num_blocks
        self._free_heap = list(range(num_blocks))  # each block once at most; some in it may be taken
        self._in_heap = bytearray(b"\1") * num_blocks
        self._num_blank = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._extents: dict[int, int] = {}

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

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) when there are too few."""
        if count > self.num_free:
            return None
        blocks: list[int] = []
        while len(blocks) < count and self._num_blank:
            block = heapq.heappop(self._free_heap)
            self._in_heap[block] = 0
            if self._is_free[block]:
                self._take_blank(block)
                blocks.append(block)
        while len(blocks) < count:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            blocks.append(block)
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """One more reader of a cached block."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each. A chain's last block becomes idle, and is evicted, first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self.cache is not None and self.cache.holds(block):
                    self._idle[block] = None
                else:
                    self._give_back(block)

    def longest_run(self) -> int:
        """Number of slabs of the largest extent that could be reserved now."""
        free = bytearray(self._is_free)
        for block in self._idle:
            free[block] = 1
        return max(map(len, free.split(b"\0")))

    def reserve_extent(self, count: int) -> int | None:
        """First slab of `count` neighbouring ones, found from the top; None when no such run is free."""
        run = 0
        for block in range(self.num_blocks - 1, -1, -1):
            run = run + 1 if self._is_free[block] or block in self._idle else 0
            if run == count:
                for taken in range(block, block + count):
                    if self._is_free[taken]:
                        self._take_blank(taken)
                    else:
                        del self._idle[taken]
                        self._forget(taken)
                self._extents[block] = count
                return block
        return None

    def shrink_extent(self, start: int, count: int) -> None:
        """Keep an extent's first `count` slabs, give the others back."""
        held = self._extents[start]
        if not 0 < count <= held:
            raise ValueError(f"an extent of {held} slabs can't shrink to {count}")
        self._extents[start] = count
        for block in range(start + count, start + held):
            self._give_back(block)

    def advance_extent(self, start: int, count: int) -> int:
        """Give an extent's first `count` slabs back; returns where it starts now."""
        held = self._extents[start]
        if not 0 < count < held:
            raise ValueError(f"an extent of {held} slabs can't lose its first {count}")
        del self._extents[start]
        self._extents[start + count] = held - count
        for block in range(start, start + count):
            self._give_back(block)
        return start + count

    def release_extent(self, start: int) -> None:
        """Give an extent's slabs back."""
        for block in range(start, start + self._extents.pop(start)):
            self._give_back(block)

    def _take_blank(self, block: int) -> None:
        self._is_free[block] = False
        self._num_blank -= 1

    def _give_back(self, block: int) -> None:
        self._is_free[block] = True
        self._num_blank += 1
        if not self._in_heap[block]:
            self._in_heap[block] = 1
            heapq.heappush(self._free_heap, block)

    def _forget(self, block: int) -> None:
        if self.cache is not None:
            self.cache.remove(block)
