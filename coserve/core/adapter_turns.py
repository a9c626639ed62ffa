"""Whose turn it is where more adapters are asked for than may be in use at once.

Requests whose adapter is in use go past one that waits for room, which keeps the device busy, but not for
ever: where somebody has waited `DRAIN_AFTER` seconds, those behind him in the queue get no more of the
adapters in use that have to go for him, the ones with the fewest readers. Requests for the base, before him
in the queue, or on other adapters don't notice.
"""

from __future__ import annotations

from collections.abc import Callable

from coserve.core.adapter_slots import AdapterSlot, AdapterSlots

DRAIN_AFTER = 1.0  # seconds


class AdapterTurns:
    """At most `max_in_use` adapters of requests are read or pinned at a time; `is_served` tells them from
    those in training. Asked in the queue's order, in passes that `begin` each."""

    def __init__(
        self,
        slots: AdapterSlots,
        max_in_use: int,
        is_served: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._max_in_use = max_in_use
        self._is_served = is_served
        self._clock = clock
        self._since: dict[str, float] = {}  # who waits for room
        self._yielding: dict[str, str] = {}  # adapter in use -> for whom it is drained
        self._closed: set[str] = set()  # in this pass: to those behind who it is drained for

    def begin(self) -> None:
        """A pass over the queue begins."""
        self._closed.clear()

    def is_closed(self, key: str) -> bool:
        """Somebody before in the queue needs its place."""
        return key in self._closed

    def has_room(self, key: str) -> bool:
        """Whether it may be in use too."""
        held = [slot.key for slot in self._served()]
        return key in held or len(held) < self._max_in_use

    def wait(self, key: str, rank: int) -> None:
        """It has no place in this pass."""
        now = self._clock()
        if now - self._since.setdefault(key, now) < DRAIN_AFTER:
            return
        held = self._slots.held
        in_use = {s.key: s for s in held if s.readers and not s.pinned and self._is_served(s.key)}
        self._yielding = {victim: by for victim, by in self._yielding.items() if victim in in_use}
        victims = [victim for victim, by in self._yielding.items() if by == key]
        others = sorted(
            (slot for slot in in_use.values() if slot.key not in self._yielding),
            key=lambda slot: (slot.readers, self._slots.use.of(slot.key)),
        )
        rows = self._slots.max_rows - sum(len(slot.rows) for slot in held)
        rows += sum(len(in_use[victim].rows) for victim in victims)
        while others and (rows < rank or not victims):
            victim = others.pop(0)
            self._yielding[victim.key] = key
            victims.append(victim.key)
            rows += len(victim.rows)
        self._closed.update(victims)

    def forget(self, key: str) -> None:
        """It has its place, or nobody asks for it any more."""
        if self._since.pop(key, None) is not None:
            self._yielding = {victim: by for victim, by in self._yielding.items() if by != key}

    def _served(self) -> list[AdapterSlot]:
        return [slot for slot in self._slots.held if self._is_served(slot.key)]
