"""Every slab has one owner, and after all is released all are free (I5)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.core.block_pool import BlockPool
from coserve.core.prefix_cache import PrefixCache, block_key, root_key


def test_blocks_come_lowest_first_and_extents_from_the_top() -> None:
    pool = BlockPool(10)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.reserve_extent(4) == 6
    assert pool.num_free == 3
    assert pool.reserve_extent(4) is None
    pool.release_extent(6)
    pool.release([0, 1, 2])
    assert pool.num_free == 10


def test_too_many_takes_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_idle_cached_blocks_are_found_again_and_evicted_oldest_first() -> None:
    cache = PrefixCache()
    pool = BlockPool(3, cache)
    keys = [block_key(root_key(None), [i]) for i in range(3)]
    for key in keys[:2]:
        (block,) = pool.allocate(1) or []
        cache.insert(key, block)
        pool.release([block])
    assert pool.num_free == 3 and pool.num_idle == 2
    pool.allocate(2)
    assert cache.lookup(keys[0]) is None
    assert cache.lookup(keys[1]) is not None


def test_shared_block_is_free_only_after_its_last_reader() -> None:
    cache = PrefixCache()
    pool = BlockPool(2, cache)
    (block,) = pool.allocate(1) or []
    cache.insert(root_key("a"), block)
    pool.share(block)
    pool.release([block])
    assert pool.num_kv_blocks == 1
    pool.release([block])
    assert pool.num_kv_blocks == 0 and pool.num_idle == 1


def test_an_extent_may_take_idle_blocks() -> None:
    cache = PrefixCache()
    pool = BlockPool(4, cache)
    blocks = pool.allocate(4) or []
    for block in blocks:
        cache.insert(block_key(root_key(None), [block]), block)
    pool.release(blocks)
    assert pool.reserve_extent(4) == 0
    assert len(cache) == 0


def test_a_shrunk_extent_keeps_its_head_and_gives_the_tail_back() -> None:
    pool = BlockPool(10)
    start = pool.reserve_extent(6)
    assert start == 4 and pool.longest_run() == 4
    pool.shrink_extent(start, 2)
    assert (pool.num_extent_slabs, pool.num_free, pool.longest_run()) == (2, 8, 4)
    assert pool.allocate(8) == [0, 1, 2, 3, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="2 slabs"):
        pool.shrink_extent(start, 3)
    pool.release_extent(start)
    assert pool.num_free == 2


def test_an_extent_gives_its_first_slabs_back_and_moves_up() -> None:
    pool = BlockPool(10)
    assert pool.reserve_extent(6) == 4
    start = pool.advance_extent(4, 2)
    assert (start, pool.num_extent_slabs, pool.num_free) == (6, 4, 6)
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="4 slabs"):
        pool.advance_extent(start, 4)
    pool.shrink_extent(start, 1)
    pool.release_extent(start)
    assert pool.num_free == 4


ACTIONS = ["take", "free", "extent", "release", "shrink", "advance", "cache"]


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 6))))
def test_no_slab_has_two_owners(actions: list[tuple[str, int]]) -> None:
    cache = PrefixCache()
    pool = BlockPool(16, cache)
    held: list[list[int]] = []
    extents: dict[int, int] = {}
    serial = 0
    for action, count in actions:
        if action == "take":
            blocks = pool.allocate(count)
            if blocks is not None:
                held.append(blocks)
        elif action == "cache" and held:
            serial += 1
            cache.insert(block_key(root_key(None), [serial]), held[-1][0])
        elif action == "free" and held:
            pool.release(held.pop(0))
        elif action == "extent":
            fits = pool.longest_run() >= count
            start = pool.reserve_extent(count)
            assert (start is not None) == fits
            if start is not None:
                extents[start] = count
        elif action == "shrink" and extents:
            start = next(iter(extents))
            extents[start] = min(extents[start], count)
            pool.shrink_extent(start, extents[start])
        elif action == "advance" and extents:
            start, length = next(iter(extents.items()))
            if count < length:
                del extents[start]
                extents[pool.advance_extent(start, count)] = length - count
        elif action == "release" and extents:
            start = next(iter(extents))
            del extents[start]
            pool.release_extent(start)
        owned = [b for blocks in held for b in blocks]
        owned += [b for start, count in extents.items() for b in range(start, start + count)]
        assert len(owned) == len(set(owned))
        assert pool.num_free == 16 - len(owned)
    for blocks in held:
        pool.release(blocks)
    for start in extents:
        pool.release_extent(start)
    assert pool.num_free == 16


def test_chains_of_different_adapters_never_meet() -> None:
    tokens = [1, 2, 3, 4]
    roots = [root_key(adapter, salt) for adapter in (None, "sha256:a", "sha256:b") for salt in ("", "x", "y")]
    assert len({block_key(root, tokens) for root in roots}) == 9
    with pytest.raises(KeyError):
        BlockPool(1).release_extent(0)


def test_extents_that_come_and_go_leave_nothing_behind() -> None:
    """The list of free blocks holds each once, however often training takes and gives its memory."""
    pool = BlockPool(8)
    for _ in range(50):
        start = pool.reserve_extent(6)
        assert start == 2
        pool.release_extent(start)
    assert sorted(pool._free_heap) == list(range(8))
    assert pool.allocate(8) == list(range(8))


def test_an_extent_goes_where_the_prefix_cache_knows_nothing() -> None:
    cache = PrefixCache()
    pool = BlockPool(16, cache)
    blocks = pool.allocate(12) or []
    for block in (10, 11):
        cache.insert(block_key(root_key(None), [block]), block)
    pool.release(blocks)
    assert (pool.reserve_extent(6), len(cache), pool.num_idle) == (4, 2, 2)
    assert (pool.reserve_extent(6), len(cache), pool.num_idle) == (10, 0, 0), "if it fits nowhere else"
