"""Which adapters have rows on the device, who reads them, and which may go.

An adapter of rank r takes r rows of the pool, so rank 8 costs an eighth of rank 64. Adapters in use, pinned
or just being written are never evicted; of the others the least used of late goes first (adapter_use.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coserve.core.adapter_use import AdapterUse


@dataclass(slots=True)
class AdapterSlot:
    """An adapter's rows. `readers` counts the requests (and jobs) that use it now. One with a `lender` reads
    that adapter's rows for now; its own are set aside for when they part. Until it `is_written` nobody may
    read it, and nobody else may have its rows."""

    key: str
    rows: list[int]
    readers: int = 0
    pinned: bool = False
    doomed: bool = field(default=False)  # unloaded while in use: goes with its last reader
    lender: str | None = None
    is_written: bool = True


class AdapterSlots:
    """Row allocation for at most `max_adapters` adapters in `max_rows` rows; `on_free` hears of rows that
    an adapter has left."""

    def __init__(
        self, max_rows: int, max_adapters: int, on_free: Callable[[list[int]], None] | None = None
    ) -> None:
        self.max_rows = max_rows
        self.max_adapters = max_adapters
        self.use = AdapterUse()
        self.changes = 0  # counts them, for those who tell others which adapters have rows
        self._on_free = on_free
        self._free_rows = list(range(max_rows - 1, -1, -1))
        self._slots: dict[str, AdapterSlot] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def rows_in_use(self) -> int:
        """Rows that adapters have now."""
        return self.max_rows - len(self._free_rows)

    @property
    def keys(self) -> list[str]:
        """Adapters with rows."""
        return list(self._slots)

    @property
    def held(self) -> list[AdapterSlot]:
        """The slots that can't be had now: read, pinned, or being written."""
        return [slot for slot in self._slots.values() if not self._is_idle(slot)]

    def rows(self, key: str) -> list[int]:
        """The numbers of the rows that the adapter is read from, in rank order."""
        slot = self._slots[key]
        return slot.rows if slot.lender is None else self._slots[slot.lender].rows

    def allocate(
        self, key: str, rank: int, *, pinned: bool = False, is_written: bool = True
    ) -> tuple[AdapterSlot, list[str]] | None:
        """Rows for an adapter that has none, with the keys evicted for it; None, and nobody is evicted, while
        too many are in use. One that isn't `is_written` yet waits for `written`."""
        held = self.held
        if len(held) >= self.max_adapters or self.max_rows - sum(len(s.rows) for s in held) < rank:
            return None
        evicted = []
        while len(self._slots) >= self.max_adapters or len(self._free_rows) < rank:
            idle = (slot for slot in self._slots.values() if self._is_idle(slot))
            victim = min(idle, key=lambda slot: self.use.of(slot.key))
            self._remove(victim)
            evicted.append(victim.key)
        rows = [self._free_rows.pop() for _ in range(rank)]
        slot = AdapterSlot(key, rows, pinned=pinned, is_written=is_written)
        self._slots[key] = slot
        self.changes += 1
        return slot, evicted

    def written(self, key: str) -> None:
        """The rows hold the adapter now: it may be read."""
        self._slots[key].is_written = True

    def is_ready(self, key: str) -> bool:
        """It has rows, and they hold it."""
        return key in self._slots and self._slots[key].is_written

    def borrow(self, key: str, lender: str) -> bool:
        """Let a new key read the rows of `lender`, until they `part` or its last reader has gone; as many
        rows are set aside. False while all rows are in use."""
        got = self.allocate(key, len(self._slots[lender].rows))
        if got is None:
            return False
        got[0].lender, got[0].doomed = lender, True
        return True

    def part(self, key: str) -> None:
        """What `key` has borrowed becomes its own; its lender has the rows that were set aside."""
        slot = self._slots[key]
        assert slot.lender is not None
        lender = self._slots[slot.lender]
        slot.rows, lender.rows, slot.lender = lender.rows, slot.rows, None

    def acquire(self, key: str) -> AdapterSlot:
        """One more reader, and one more use."""
        slot = self._slots[key]
        slot.readers += 1
        self.use.count(key)
        return slot

    def release(self, key: str) -> bool:
        """One reader less; True when this freed the rows of an adapter that was unloaded meanwhile."""
        slot = self._slots[key]
        slot.readers -= 1
        if slot.doomed and slot.readers == 0:
            self._remove(slot)
            return True
        return False

    def readers(self, key: str) -> int:
        """How many use it now; 0 for one without rows."""
        return self._slots[key].readers if key in self._slots else 0

    def is_idle(self, key: str) -> bool:
        """It has rows that nobody reads, and that anybody else may have."""
        return key in self._slots and self._is_idle(self._slots[key])

    @staticmethod
    def _is_idle(slot: AdapterSlot) -> bool:
        return not (slot.readers or slot.pinned) and slot.is_written

    def rename(self, key: str, name: str) -> None:
        """The same rows under another key, one that has none."""
        slot = self._slots.pop(key)
        slot.key = name
        self._slots[name] = slot
        self.use.rename(key, name)
        self.changes += 1

    def pin(self, key: str, pinned: bool) -> None:
        """Keep an adapter on the device whoever reads it, or no longer."""
        self._slots[key].pinned = pinned

    def revive(self, key: str) -> None:
        """An adapter whose unload still waits for its last reader is wanted again."""
        self._slots[key].doomed = False

    def unload(self, key: str) -> bool:
        """Free the rows now, or with the last reader; True when they are free now."""
        slot = self._slots.get(key)
        if slot is None:
            return True
        if slot.readers:
            slot.doomed, slot.pinned = True, False
            return False
        self._remove(slot)
        return True

    def _remove(self, slot: AdapterSlot) -> None:
        del self._slots[slot.key]
        self.changes += 1
        self._free_rows.extend(reversed(slot.rows))
        if self._on_free is not None:
            self._on_free(slot.rows)
