"""How much each adapter has been used of late: who stays on the device and in host memory follows it.

A use counts 1 when it happens and half as much HALF_LIFE uses (of any adapter) later, so an adapter that is
asked for every day outlives one that is read once (Lee et al. 2001, LRFU), and yesterday's favourite goes.
What is known of those that have left is kept too, of so many that memory doesn't grow with their number.
"""

from __future__ import annotations

HALF_LIFE = 512  # uses of all adapters together
MOST_KNOWN = 2048  # adapters that are remembered; the less used half of more goes
_LARGEST = 1e100  # what one use may weigh before all are scaled down


class AdapterUse:
    """Weights of past uses, by adapter."""

    def __init__(self, half_life: float = HALF_LIFE, most: int = MOST_KNOWN) -> None:
        self._growth: float = 2.0 ** (1.0 / half_life)
        self._most = most
        self._weight = 1.0  # of a use now; that it grows is how older ones fade
        self._sums: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def of(self, key: str) -> float:
        """How much it was used; only good for comparing with others' at the same time."""
        return self._sums.get(key, 0.0)

    def count(self, key: str) -> None:
        """It is used now."""
        self._weight *= self._growth
        self._sums[key] = self._sums.get(key, 0.0) + self._weight
        if self._weight > _LARGEST:
            self._sums = {known: value / self._weight for known, value in self._sums.items()}
            self._weight = 1.0
        if len(self._sums) > self._most:
            kept = sorted(self._sums, key=self._sums.__getitem__)[len(self._sums) // 2 :]
            self._sums = {known: self._sums[known] for known in kept}

    def rename(self, key: str, name: str) -> None:
        """What one was used is the other's past."""
        self._sums[name] = self._sums.pop(key, 0.0)
