"""Adapters in use go first, but nobody waits for room for ever."""

from __future__ import annotations

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.adapter_turns import DRAIN_AFTER, AdapterTurns

JOB = "ftjob-1"


class Queue:
    """Requests for adapters, in order, and what a scheduler does with them: `most` may run at a time, each
    for `steps`."""

    def __init__(self, rows: int, max_in_use: int, rank: int = 1, steps: int = 4) -> None:
        self.now, self.rank, self.steps = 0.0, rank, steps
        self.slots = AdapterSlots(rows, 100)
        self.turns = AdapterTurns(self.slots, max_in_use, lambda key: key != JOB, lambda: self.now)
        self.waiting: list[str] = []
        self.running: list[list[object]] = []
        self.began: dict[str, list[float]] = {}

    def admits(self, key: str) -> bool:
        if self.turns.is_closed(key):
            return False
        if not self.turns.has_room(key) or (
            key not in self.slots and not self.slots.allocate(key, self.rank)
        ):
            self.turns.wait(key, self.rank)
            return False
        self.turns.forget(key)
        self.slots.acquire(key)
        return True

    def step(self, seconds: float = 0.1) -> None:
        self.now += seconds
        for run in self.running:
            run[1] = int(str(run[1])) - 1
        for key, left in self.running:
            if left == 0:
                self.slots.release(str(key))
        self.running = [run for run in self.running if run[1] != 0]
        self.turns.begin()
        for key in list(self.waiting):
            if len(self.running) < 8 and self.admits(key):
                self.waiting.remove(key)
                self.running.append([key, self.steps])
                self.began.setdefault(key, []).append(self.now)


def test_who_waits_behind_a_stream_of_another_adapter_has_his_turn() -> None:
    """sglang PR #15129, vllm PR #15422: every step brings requests for A, and B comes once."""
    queue = Queue(rows=1, max_in_use=4)
    queue.waiting = ["a", "b"]
    for _ in range(40):
        queue.waiting += ["a", "a"]
        queue.step()
    assert len(queue.began["b"]) == 1
    assert queue.began["b"][0] <= DRAIN_AFTER + 0.1 * (queue.steps + 3)
    assert queue.began["a"][-1] > queue.began["b"][0], "A goes on after it"


def test_those_before_him_are_let_in() -> None:
    queue = Queue(rows=1, max_in_use=4, steps=30)
    queue.waiting = ["a", "b"]
    queue.step()
    queue.now += DRAIN_AFTER
    queue.waiting = ["a", "b", "a"]
    queue.step()
    assert len(queue.began["a"]) == 2 and queue.waiting == ["b", "a"]


def test_adapters_in_use_are_never_more_than_allowed() -> None:
    """sglang#23141: more adapters than may be in use, all at once."""
    queue = Queue(rows=100, max_in_use=3)
    queue.waiting = [f"a{number % 10}" for number in range(60)]
    while queue.waiting or queue.running:
        queue.step()
        assert len({str(key) for key, _ in queue.running}) <= 3
    assert sum(map(len, queue.began.values())) == 60


def test_one_that_needs_many_rows_has_as_many_drained() -> None:
    queue = Queue(rows=4, max_in_use=8)
    for key in ("a", "b", "c", "d"):
        queue.waiting.append(key)
    queue.step()
    queue.rank = 3
    queue.waiting = ["big"]
    queue.step()
    queue.now += DRAIN_AFTER
    queue.turns.begin()
    assert not queue.admits("big")
    assert sum(queue.turns.is_closed(key) for key in "abcd") == 3


def test_pinned_adapters_and_those_in_training_are_not_drained() -> None:
    queue = Queue(rows=3, max_in_use=8)
    queue.slots.allocate(JOB, 1, pinned=True)
    queue.slots.acquire(JOB)
    queue.slots.allocate("pinned", 1, pinned=True)
    queue.waiting = ["a", "b"]
    queue.step()
    queue.now += DRAIN_AFTER
    queue.step()
    assert queue.turns.is_closed("a")
    assert not queue.turns.is_closed("pinned") and not queue.turns.is_closed(JOB)
