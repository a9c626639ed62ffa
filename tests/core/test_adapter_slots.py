"""Rows on the device: as many as the rank, evicted least recently used, never under a reader."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coserve.core.adapter_slots import AdapterSlots


def test_an_adapter_takes_as_many_rows_as_its_rank() -> None:
    slots = AdapterSlots(max_rows=16, max_adapters=4)
    first, evicted = slots.allocate("a", 8) or (None, None)
    assert first is not None and len(first.rows) == 8 and evicted == []
    assert slots.rows_in_use == 8 and slots.rows("a") == first.rows


def test_the_least_recently_used_goes_and_readers_and_pins_stay() -> None:
    slots = AdapterSlots(max_rows=24, max_adapters=3)
    for key in ("a", "b", "c"):
        slots.allocate(key, 8)
    slots.acquire("a")
    slots.release("a")
    slots.pin("b", True)
    slots.acquire("c")
    got = slots.allocate("d", 8)
    assert got is not None and got[1] == ["a"]
    slots.acquire("d")
    assert slots.allocate("e", 8) is None, "b is pinned, c and d are read"


def test_an_unloaded_adapter_goes_with_its_last_reader() -> None:
    slots = AdapterSlots(max_rows=8, max_adapters=2)
    slots.allocate("a", 4)
    slots.acquire("a")
    assert not slots.unload("a")
    slots.revive("a")
    assert not slots.release("a") and "a" in slots
    slots.acquire("a")
    slots.unload("a")
    assert slots.release("a") and "a" not in slots
    assert slots.unload("a"), "there is nothing left to free"


ACTIONS = st.tuples(st.sampled_from(["load", "read", "done", "unload"]), st.integers(0, 5))


@given(st.lists(ACTIONS, max_size=60))
def test_no_row_has_two_owners(actions: list[tuple[str, int]]) -> None:
    """And whoever listens hears of every row that its owner leaves."""
    owned: set[int] = set()
    slots = AdapterSlots(max_rows=20, max_adapters=3, on_free=owned.difference_update)
    readers: dict[str, int] = {}
    for action, number in actions:
        key = f"a{number}"
        if action == "load" and key not in slots:
            got = slots.allocate(key, 2 * number + 1)
            owned.update(got[0].rows if got else ())
        elif action == "read" and key in slots:
            slots.acquire(key)
            readers[key] = readers.get(key, 0) + 1
        elif action == "done" and readers.get(key):
            slots.release(key)
            readers[key] -= 1
        elif action == "unload":
            slots.unload(key)
        rows = [row for held in slots.keys for row in slots.rows(held)]
        assert len(rows) == len(set(rows)) == slots.rows_in_use
        assert owned == set(rows)
        assert all(held in slots for held, count in readers.items() if count)
