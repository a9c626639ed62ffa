"""Jobs share the device's measured seconds by weight 2^-priority, whatever their shapes, under a clock of
the simulation's own."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.core.simulation import Simulation

# A job's optimizer step: its microbatches' tokens, and how the scheduler may cut them.
SHAPES: dict[str, tuple[list[int], int]] = {
    "many small": ([40] * 8, 0),
    "few large": ([512, 300], 0),
    "own windows": ([200] * 3, 16),
}


class Jobs:
    """Jobs that take one optimizer step after the other, and the device seconds that each was charged."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: dict[str, tuple[list[int], int, int]] = {}
        self._open: dict[str, list] = {}
        plain = sim.scheduler.training.charge

        def charge(job_id: str, seconds: float) -> None:
            self.seconds[job_id] += seconds
            plain(job_id, seconds)

        sim.scheduler.training.charge = charge  # type: ignore[method-assign]

    def add(self, name: str, shape: str, priority: int = 0) -> None:
        self._running[name] = (*SHAPES[shape], priority)
        self._open[name] = []

    def run(self, until: float) -> None:
        """Steps until the simulated clock shows `until`."""
        while self.sim.now < until:
            for name, (tokens, window, priority) in self._running.items():
                if all(sequence.done for sequence in self._open[name]):
                    self._open[name] = self.sim.job(name, tokens, slabs=4, window=window, priority=priority)
            self.sim.step()

    def shares(self, *names: str) -> list[float]:
        total = sum(self.seconds[name] for name in names)
        return [self.seconds[name] / total for name in names]


@pytest.mark.parametrize("priorities", [(0, 0, 0), (-1, 0, 0), (-2, 0, 1)])
@pytest.mark.parametrize("chat", [False, True])
def test_seconds_go_by_weight_whatever_the_shapes(priorities: tuple[int, ...], chat: bool) -> None:
    """Alone, and beside chat whose target leaves less than the jobs could use."""
    sim = Simulation(blocks=6000, max_tokens=512, tpot=0.012)
    jobs = Jobs(sim)
    for (shape, priority), name in zip(zip(SHAPES, priorities, strict=True), "abc", strict=True):
        jobs.add(name, shape, priority)
    for index in range(6 if chat else 0):
        sim.request(f"r{index}", 20, 100_000)
    jobs.run(6.0)
    weights = [2.0**-priority for priority in priorities]
    wanted = [weight / sum(weights) for weight in weights]
    assert jobs.shares(*"abc") == pytest.approx(wanted, rel=0.1)


def test_a_newcomer_gets_its_share_and_no_back_pay() -> None:
    sim = Simulation(blocks=6000, max_tokens=512)
    jobs = Jobs(sim)
    jobs.add("old", "few large")
    jobs.run(3.0)
    before = jobs.seconds["old"]
    jobs.add("new", "many small")
    jobs.run(6.0)
    assert jobs.seconds["new"] == pytest.approx(jobs.seconds["old"] - before, rel=0.1)


def test_jobs_share_forward_batches_and_go_forward_beside_each_others_backward() -> None:
    sim = Simulation(blocks=6000, max_tokens=512)
    jobs = Jobs(sim)
    for name, shape in zip("abc", SHAPES, strict=True):
        jobs.add(name, shape)
    jobs.run(1.0)
    forwards = [{span.sequence.job_id for span in plan.training_forward} for plan in sim.plans]
    backwards = [{span.sequence.job_id for span in plan.training_backward} for plan in sim.plans]
    assert any(len(names) > 1 for names in forwards)
    assert any(len(names) > 1 for names in backwards)
    assert any(f and b - f for f, b in zip(forwards, backwards, strict=True))
