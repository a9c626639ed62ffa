"""Load in waves takes training's memory at each crest: few evictions, progress on both sides, no leak."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.request import Request
from coserve.core.training_queue import EVICTIONS_TO_WAIT, LEAST_AWAY
from coserve.core.training_sequence import TrainingSequence

from .simulation import Simulation

BLOCKS = 100
LEVELS = (20, 24, 28, 34, 40)


class Waves:
    """A crest of requests every `period` seconds beside one that always decodes, and a job without end."""

    def __init__(self, period: float, crest: int, microbatches: list[int]) -> None:
        self.sim = Simulation(blocks=BLOCKS, max_num_seqs=32, max_tokens=64, tpot=12e-3)
        self.requests: list[Request] = []
        self.sequences: list[TrainingSequence] = []
        self.steps = -1  # optimizer steps that are done
        self._period, self._crest, self._microbatches = period, crest, microbatches
        self._job: list[TrainingSequence] = []

    def run(self, seconds: float) -> None:
        sim, next_crest, steady = self.sim, 0.0, None
        while sim.now < seconds:
            if steady is None or steady.finished:
                steady = self._ask(8, 200)
            if sim.now >= next_crest:
                next_crest += self._period
                for _ in range(self._crest):
                    self._ask(32, 30)
            if all(s.done for s in self._job):
                self.steps += 1
                self._job = sim.job("job", self._microbatches, slabs=LEVELS)
                self.sequences += self._job
            plan = sim.step(next_crest)
            assert not plan.preempted or sim.pool.num_extent_slabs == 0, "training gives way first"

    def _ask(self, prompt: int, output: int) -> Request:
        self.requests.append(self.sim.request(f"r{len(self.requests)}", prompt, output))
        return self.requests[-1]


@settings(max_examples=15, deadline=None)
@given(
    period=st.floats(0.3, 3.0),
    crest=st.integers(4, 16),
    microbatches=st.lists(st.integers(64, 1500), min_size=1, max_size=4),
)
def test_evictions_are_few_all_requests_end_and_nothing_is_left(period, crest, microbatches) -> None:
    """Each wait doubles and its time is waited, so evictions grow with the logarithm of time at most."""
    waves, seconds = Waves(period, crest, microbatches), 6.0
    waves.run(seconds)
    most = max(s.evictions for s in waves.sequences)
    assert most <= EVICTIONS_TO_WAIT + math.log2(1.0 + seconds / LEAST_AWAY) + 1
    waves.sim.run(20_000)
    assert all(r.num_output_tokens == r.sampling.max_tokens for r in waves.requests)
    assert all(s.done for s in waves.sequences)
    assert waves.sim.pool.num_free == BLOCKS and waves.sim.pool.num_extent_slabs == 0


@pytest.mark.parametrize(("period", "crest", "least"), [(1.0, 12, 4), (0.7, 8, 3)])
def test_training_gets_on_in_the_troughs(period, crest, least) -> None:
    """A trough has time for one or two microbatches, not for an optimizer step of four."""
    waves = Waves(period, crest, [1500] * 4)
    waves.run(20.0)
    assert waves.steps >= least
    assert waves.sim.scheduler.training.num_evictions <= 4 * 20.0 / period


def test_a_crest_that_leaves_no_time_costs_little() -> None:
    waves = Waves(0.5, 12, [1500] * 4)
    waves.run(20.0)
    assert waves.sim.training_seconds < 0.15 * waves.sim.now


def test_what_a_job_lost_once_it_keeps_from_then_on() -> None:
    sim = Simulation(blocks=400)
    first, second, third = sim.job("job", [64, 64, 64], slabs=LEVELS)
    queue = sim.scheduler.training

    def second_goes_backward() -> None:
        first.cursor = second.cursor = 64
        first.unit_cursor, second.unit_cursor = len(first.units), 1
        second.extent, second.level = sim.pool.reserve_extent(40), 4
        assert first.done and second.holds_gradients

    second_goes_backward()
    assert not queue.keeps_gradients("job")
    assert queue.evict_one() == [first, second, third], "the whole step, once"
    second_goes_backward()
    assert queue.keeps_gradients("job")
    assert queue.evict_one() == [second, third] and first.done
    assert sim.pool.num_free == 400


def test_after_an_eviction_one_microbatch_at_a_time_has_memory() -> None:
    sim = Simulation(blocks=400)
    first, second, third = sim.job("job", [640, 640, 64], slabs=LEVELS)
    queue = sim.scheduler.training
    sim.step()
    assert queue.evict_one() and queue.evict_one() == []
    for _ in range(200):
        sim.step()
        assert first.done or second.extent is None
    sim.run()
    assert second.done and third.done and sim.pool.num_free == 400
