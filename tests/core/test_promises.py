"""What the scheduler promises whatever arrives when, each on random loads under the simulated clock."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.request import Request, RequestStatus
from coserve.core.slo import LONGEST, PACE, PROBE_EVERY, MinimumShare
from coserve.core.step_plan import StepPlan
from coserve.core.training_queue import LEAD
from coserve.core.training_sequence import TrainingSequence

from .simulation import PER_TOKEN, PER_UNIT_TOKEN, Simulation

TILE_SECONDS = 64 * PER_TOKEN  # the smallest forward window
UNIT_SECONDS = 64 * PER_UNIT_TOKEN * 2.0  # the dearest backward unit
MAX_TOKENS = 512  # of a step
LAYER_SECONDS = MAX_TOKENS * PER_TOKEN / 2  # of the widest windows apart, between two looks for arrivals

# Milliseconds of arrival, prompt, output; and each job's microbatches.
REQUESTS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12
)
JOBS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), max_size=3)
TARGETS = st.sampled_from([0.0, 8e-3, 20e-3, 50e-3])


def replay(
    sim: Simulation, requests: list[tuple[int, int, int]], watch: Callable[[StepPlan], None]
) -> list[Request]:
    """Requests at their times, steps until nothing is owed; `watch` sees every plan after its step."""
    coming, made = sorted(requests), []
    for _ in range(4000):
        while coming and coming[0][0] / 1e3 <= sim.now:
            _, prompt, output = coming.pop(0)
            made.append(sim.request(f"r{len(made)}", prompt, output))
        next_arrival = coming[0][0] / 1e3 if coming else math.inf
        if not sim.scheduler.has_requests and not sim.scheduler.training.has_work:
            if not coming:
                return made
            sim.now = next_arrival
            continue
        watch(sim.step(next_arrival))
    raise AssertionError("work is left")


class Books:
    """What every sequence has paid: each token forward once, units in order, gradients in index order."""

    def __init__(self) -> None:
        self.paid: dict[str, int] = defaultdict(int)
        self.units: dict[str, int] = defaultdict(int)
        self.trained: dict[str, list[int]] = defaultdict(list)

    def watch(self, plan: StepPlan) -> None:
        for request in plan.preempted:
            self.paid[request.sequence_id] = 0
        for sequence in plan.evicted:
            self.paid[sequence.sequence_id] = self.units[sequence.sequence_id] = 0
            self.trained[sequence.job_id] = [i for i in self.trained[sequence.job_id] if i != sequence.index]
        for span in plan.inference:
            key = span.request.sequence_id
            if self.paid[key] == 0:
                self.paid[key] = span.start  # what the prefix cache had
            assert span.start == self.paid[key] and span.length > 0
            self.paid[key] += span.length
        for span in plan.training_forward:
            key = span.sequence.sequence_id
            assert span.start == self.paid[key] and span.length > 0
            if span.sequence.cursor > span.start:  # else it rests between two layers
                self.paid[key] += span.length
        for span in plan.training_backward:
            key = span.sequence.sequence_id
            assert span.start == self.units[key] and self.paid[key] == span.sequence.num_tokens
            self.units[key] = span.sequence.unit_cursor
            self.trained[span.sequence.job_id].append(span.sequence.index)
            assert self.trained[span.sequence.job_id] == sorted(self.trained[span.sequence.job_id])


@settings(max_examples=60, deadline=None)
@given(REQUESTS, JOBS, TARGETS, st.integers(32, 80), st.booleans())
def test_every_token_is_paid_once_in_order_and_the_pool_is_free_after(
    requests, jobs, tpot, blocks, caching
) -> None:
    """I1, I2 and I5 as far as core sees them: also under preemption, eviction and resting windows."""
    sim = Simulation(blocks=blocks, prefix_caching=caching, max_num_seqs=4, max_tokens=80, tpot=tpot)
    sequences = [s for i, sizes in enumerate(jobs) for s in sim.job(f"j{i}", sizes, slabs=6)]
    books = Books()
    made = replay(sim, requests, books.watch)
    assert all(r.finished and r.num_output_tokens == r.sampling.max_tokens for r in made)
    assert all(s.done for s in sequences)
    assert all(books.paid[r.sequence_id] == r.num_tokens - 1 for r in made)
    assert all(books.units[s.sequence_id] == len(s.units) for s in sequences)
    assert sim.pool.num_free == blocks and sim.pool.num_extent_slabs == 0


@settings(max_examples=60, deadline=None)
@given(REQUESTS, JOBS, TARGETS)
def test_no_step_is_idle_and_none_leaves_out_what_fits(requests, jobs, tpot) -> None:
    """With memory to spare: whoever owes one token gets it in every step, whoever waits is taken in while
    tokens and seats last, and training runs whenever nobody else does."""
    sim = Simulation(blocks=600, tpot=tpot)
    for index, sizes in enumerate(jobs):
        sim.job(f"j{index}", sizes, slabs=6)
    scheduler = sim.scheduler

    def watch(plan: StepPlan) -> None:
        assert not plan.empty
        served = {span.request.sequence_id for span in plan.inference}
        assert all(r.sequence_id in served for r in decoding), "a token is owed and not planned"
        left_out = [r for r in scheduler.waiting if r.status is RequestStatus.WAITING]
        if left_out:
            # Prompts are held back for those who decode, who have their pace or a part of one, or the step
            # is full.
            paced = tpot > 0.0 and bool(decoding) and plan.training_budget == 0.0
            full = plan.inference_tokens >= scheduler.limits.max_num_batched_tokens
            seats = len(served) >= scheduler.limits.max_num_seqs
            in_parts = any(span.length > 1 or not span.samples for span in plan.inference)
            assert full or seats or in_parts or paced
        decoding[:] = [r for r in scheduler.running if r.forward_owed == 1]

    decoding: list[Request] = []
    replay(sim, requests, watch)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([8e-3, 12e-3, 20e-3, 50e-3]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200), st.integers(2, 40)), max_size=6),
)
def test_a_gap_keeps_the_target_but_for_one_unit(readers, tpot, others) -> None:
    """Once costs are known: whatever training adds, the time between two answers is what one gap may take,
    where requests alone could keep it, and a unit more at most."""
    sim = Simulation(blocks=2000, max_num_seqs=16, max_tokens=MAX_TOKENS, tpot=tpot)
    warm_up(sim)
    for index in range(readers):
        sim.request(f"reader-{index}", 8, 120)
    sim.job("job", [512] * 20, slabs=20)
    began, answered = sim.now, sim.now

    def watch(plan: StepPlan) -> None:
        nonlocal answered
        if plan.inference and decoded:
            bound = max(plan.inference_alone, LONGEST * tpot)
            assert sim.answered - answered <= bound + max(TILE_SECONDS, UNIT_SECONDS) + 1e-6
        answered = sim.answered
        decoded[:] = [r for r in sim.scheduler.running if r.num_output_tokens]

    decoded: list[Request] = []

    replay(sim, [(round(began * 1e3) + at, prompt, output) for at, prompt, output in others], watch)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.sampled_from([6e-3, 8e-3, 12e-3, 20e-3]))
def test_training_takes_what_the_target_leaves(readers, tpot) -> None:
    """Its seconds beside decoding requests are what their pace leaves, less the steps that look at inference
    alone: also where that pays for less than a unit."""
    sim = Simulation(blocks=2000, max_num_seqs=16, max_tokens=MAX_TOKENS, tpot=tpot)
    warm_up(sim)
    for index in range(readers):
        sim.request(f"reader-{index}", 8, 400)
    sim.job("job", [512] * 60, slabs=20)
    began, trained, alone = sim.now, sim.training_seconds, 0.0
    for _ in range(150):
        alone += sim.step().inference_alone
    assert sim.training_seconds - trained >= 0.8 * (sim.now - began - alone)
    assert sim.now - began >= 0.7 * 150 * PACE * tpot


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=4), min_size=1, max_size=3), st.floats(0, 0.8)
)
def test_an_arrival_beside_training_alone_waits_for_a_layer_and_a_unit(jobs, moment) -> None:
    sim = Simulation(blocks=2000, max_tokens=MAX_TOKENS)
    warm_up(sim)
    sequences = [s for i, sizes in enumerate(jobs) for s in sim.job(f"j{i}", sizes, slabs=20)]
    arrival = sim.now + moment * work_seconds(sequences)
    while sim.now < arrival and sim.scheduler.training.has_work:
        sim.step(arrival)
    assert sim.now - arrival <= LAYER_SECONDS + UNIT_SECONDS + 1e-9
    request = sim.request("late", 8, 2)
    assert [span.request for span in sim.step().inference] == [request]
    assert request.num_output_tokens == 1


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([(40, 8), (512, 2), (300, 1), (64, 3)]), min_size=2, max_size=3),
    st.sampled_from([0, 4]),
)
def test_jobs_of_equal_weight_stay_within_the_lead_and_a_window_of_one_another(shapes, readers) -> None:
    """At the end of every step, however unlike their microbatches are."""
    sim = Simulation(blocks=4000, max_tokens=MAX_TOKENS, tpot=15e-3)
    warm_up(sim)
    names = [f"j{index}" for index in range(len(shapes))]
    spent = dict.fromkeys(names, 0.0)
    charge = sim.scheduler.training.charge

    def counting(job_id: str, seconds: float) -> None:
        spent[job_id] += seconds
        charge(job_id, seconds)

    sim.scheduler.training.charge = counting
    for index in range(readers):
        sim.request(f"reader-{index}", 8, 100_000)
    work: dict[str, list[TrainingSequence]] = {name: [] for name in names}
    widest = 0.0
    for _ in range(150):
        for name, (tokens, count) in zip(names, shapes, strict=True):
            if all(s.done for s in work[name]):
                work[name] = sim.job(name, [tokens] * count, slabs=8)
        sim.step()
        widest = max(widest, max(spent.values()) - min(spent.values()))
    assert min(spent.values()) > 0.0
    assert widest <= LEAD + MAX_TOKENS * PER_TOKEN


@pytest.mark.parametrize("tpot", [8e-3, 20e-3])
def test_no_job_starves_beside_requests_whatever_its_priority(tpot: float) -> None:
    """Every job moves again within its share's time, counted from the dearest unit and the budget."""
    sim = Simulation(blocks=4000, max_tokens=MAX_TOKENS, tpot=tpot)
    warm_up(sim)
    for index in range(6):
        sim.request(f"reader-{index}", 8, 100_000)
    priorities = {"urgent": -2, "plain": 0, "patient": 2}
    sequences = {n: sim.job(n, [512] * 100, slabs=8, priority=p) for n, p in priorities.items()}
    moved = dict.fromkeys(priorities, 0)
    most = dict.fromkeys(priorities, 0)
    budget = PACE * tpot - sim.model.predict_inference(6, 6 * 30)
    weights = {name: 2.0**-priority for name, priority in priorities.items()}
    for step in range(1500):
        plan = sim.step()
        for span in (*plan.training_forward, *plan.training_backward):
            most[span.sequence.job_id] = max(most[span.sequence.job_id], step - moved[span.sequence.job_id])
            moved[span.sequence.job_id] = step
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        assert any(s.cursor for s in sequences[name])
        assert most[name] <= 2 * (TILE_SECONDS + UNIT_SECONDS) / (budget * share) + 2 * PROBE_EVERY, name


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_where_the_target_leaves_nothing_jobs_have_their_minimum_share_and_no_more(share: float) -> None:
    sim = Simulation(blocks=4000, max_tokens=MAX_TOKENS, tpot=3e-3)
    warm_up(sim)
    sim.scheduler.budgets.minimum = MinimumShare(share)
    for index in range(6):
        sim.request(f"reader-{index}", 8, 100_000)
    sim.job("job", [512] * 60, slabs=20)
    for _ in range(50):
        sim.step()
    began, trained = sim.now, sim.training_seconds
    for _ in range(500):
        sim.step()
    assert (sim.training_seconds - trained) / (sim.now - began) == pytest.approx(share, abs=0.03)


def test_a_burst_of_twenty_times_the_load_takes_the_device_at_once_and_gives_it_back() -> None:
    sim = Simulation(blocks=400, max_num_seqs=32, max_tokens=256, tpot=20e-3)
    warm_up(sim)
    (long,) = sim.job("job", [100_000], slabs=100)
    start = round(sim.now * 1e3)
    calm = [(start + 100 * i, 20, 10) for i in range(30)]
    burst = [(start + 1000 + 5 * i, 20, 10) for i in range(200)]
    crowded, alone = [], []
    before, answered = sim.training_seconds, sim.now
    decoded: list[Request] = []

    def watch(plan: StepPlan) -> None:
        nonlocal before, answered
        share = (sim.training_seconds - before) / (sim.now - sim.began)
        before = sim.training_seconds
        if plan.inference and decoded:
            gap = sim.answered - answered
            assert gap <= max(plan.inference_alone, LONGEST * 20e-3) + TILE_SECONDS + 1e-6
        answered = sim.answered
        decoded[:] = [r for r in sim.scheduler.running if r.num_output_tokens]
        if sim.scheduler.waiting:
            crowded.append(share)
        elif not plan.inference:
            alone.append(share)

    made = replay(sim, [*calm, *burst], watch)
    assert len(made) == 230 and all(r.finished for r in made) and long.done
    assert crowded and max(crowded) == 0.0, "whoever can't begin waits for no training"
    assert alone and min(alone) == pytest.approx(1.0)
    assert max(r.scheduled_at - r.arrival for r in made if r.scheduled_at is not None) < 3.0
    assert sim.pool.num_free == 400


def warm_up(sim: Simulation) -> None:
    """Let the model see decoding, prompts of several lengths and every kind of unit."""
    sim.job("warm", [300, 300], slabs=8)
    sim.run()
    for index, size in enumerate((8, 20, 40, 90, 200, 400)):
        sim.request(f"warm-{index}", size, 12)
        sim.step()
    sim.run()


def work_seconds(sequences: list[TrainingSequence]) -> float:
    """Of all that is owed, on the simulated device."""
    units = sum(unit.tokens for s in sequences for unit in s.units)
    return sum(s.num_tokens for s in sequences) * PER_TOKEN + units * PER_UNIT_TOKEN
