"""Where adapters are, in simulated time: device rows, host memory, or files that one thread reads in turn.

`coserve/lora/adapter_tiers.py` without weights: the slots are core's, the rest is when a file has been read
and what a copy to the device costs the step that needs it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from coserve.core.adapter_slots import AdapterSlots


class SimulatedTiers:
    """`read_seconds` from disk to host memory, which keeps the last `max_host`; `place_seconds` from there to
    the device, between two steps. `swaps` counts both."""

    def __init__(
        self, slots: AdapterSlots, rank: int, max_host: int, read_seconds: float, place_seconds: float
    ) -> None:
        self.slots = slots
        self.swaps: Counter[str] = Counter()
        self._rank, self._max_host = rank, max_host
        self._read_seconds, self._place_seconds = read_seconds, place_seconds
        self._host: OrderedDict[str, None] = OrderedDict()
        self._reading: dict[str, float] = {}  # when each will have been read
        self._reader_free = 0.0
        self._stall = 0.0

    def acquire(self, key: str, now: float) -> bool:
        """True when the adapter is on the device, with one reference taken; else its load has begun."""
        if key not in self.slots and not self._place(key, now):
            return False
        self.slots.acquire(key)
        return True

    def next_read(self) -> float | None:
        """When the next file will have been read; None where none is being read."""
        return min(self._reading.values(), default=None)

    def take_stall(self) -> float:
        """Seconds of copies to the device since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def _place(self, key: str, now: float) -> bool:
        if key not in self._host:
            due = self._reading.get(key)
            if due is None:
                self._reader_free = max(self._reader_free, now) + self._read_seconds
                due = self._reading[key] = self._reader_free
                self.swaps["read"] += 1
            if now < due:
                return False
            del self._reading[key]
            self._host[key] = None
            if len(self._host) > self._max_host:
                self._host.popitem(last=False)
        if self.slots.allocate(key, self._rank) is None:
            return False
        self._host.move_to_end(key)
        self.swaps["place"] += 1
        self._stall += self._place_seconds
        return True
