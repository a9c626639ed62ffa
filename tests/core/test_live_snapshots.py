"""Snapshots of adapters in training: nobody overwrites a reader's rows, they are few, and all get free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.core.live_snapshots import MOST_HELD, LiveSnapshots
from coserve.core.prefix_cache import PrefixCache
from coserve.errors import Unavailable

RANK = 4


def make(max_rows: int = 64, max_adapters: int = 8) -> tuple[AdapterSlots, BlockPool, LiveSnapshots]:
    """One job, "job", with rows."""
    slots, blocks = AdapterSlots(max_rows, max_adapters), BlockPool(64, PrefixCache())
    slots.allocate("job", RANK, pinned=True)
    slots.acquire("job")
    return slots, blocks, LiveSnapshots(slots, blocks)


def leave_kv(blocks: BlockPool, key: bytes) -> None:
    """A request computed a full block and ended: the cache keeps it."""
    (block,) = blocks.allocate(1) or []
    assert blocks.cache is not None
    blocks.cache.insert(key, block)
    blocks.release([block])


@given(
    st.lists(st.one_of(st.just("commit"), st.just("take"), st.integers(0, 20)), max_size=60),
    st.integers(2, 6),
)
def test_rows_of_a_reader_hold_its_step_and_all_is_free_in_the_end(actions, max_adapters) -> None:
    slots, blocks, live = make(max_rows=max_adapters * RANK, max_adapters=max_adapters)
    holds = dict.fromkeys(slots.rows("job"), 1)  # row -> the step whose weights were written there
    step, readers, count = 1, [], 0
    for action in actions:
        if action == "commit":
            live.part("job")
            step += 1
            holds.update(dict.fromkeys(slots.rows("job"), step))
        elif action == "take":
            try:
                readers.append(live.take("job", step))
            except Unavailable:
                assert len(slots) == max_adapters and not live._held, "only where no rows are left"
        elif readers:
            key = readers.pop(action % len(readers))
            count += 1
            leave_kv(blocks, b"%d" % count)
            live.release(key, [b"%d" % count])
        for key in readers:
            assert {holds[row] for row in slots.rows(key)} == {int(key.rpartition("@")[2])}
        assert slots.rows_in_use <= (1 + MOST_HELD) * RANK
    live.part("job")
    for key in readers:
        live.release(key, [])
    assert slots.keys == ["job"] and slots.rows_in_use == RANK
    assert not (live._snapshots or live._newest or live._held)
    assert len(blocks.cache) == 0 and blocks.num_free == blocks.num_blocks


def test_kv_of_a_step_stays_while_the_step_is_the_newest() -> None:
    _, blocks, live = make()
    key = live.take("job", 1)
    leave_kv(blocks, b"a")
    live.release(key, [b"a"])
    assert blocks.known([b"a"]) == {b"a"}
    live.take("job", 1)
    live.part("job")
    assert blocks.known([b"a"]) == {b"a"}, "its reader may ask for it"
    live.release(key, [])
    assert blocks.known([b"a"]) == set()


def test_what_is_noted_of_a_long_lived_step_stays_small() -> None:
    _, blocks, live = make()
    for index in range(50):
        key = live.take("job", 1)
        live.release(key, [b"%d %d" % (index, block) for block in range(16)])
    assert len(live._snapshots[key].block_keys) <= 2 * blocks.num_blocks


def test_rows_for_readers_come_from_idle_adapters() -> None:
    slots, _, live = make(max_rows=2 * RANK)
    slots.allocate("idle", RANK)
    live.take("job", 1)
    assert "idle" not in slots
    own = slots.rows("job")
    live.part("job")
    assert slots.rows("job:live@1") == own and not {*own} & {*slots.rows("job")}
