"""Who is turned away: by the prediction of the first token's time, and by the queue's length."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.admission import MOST_RETRY, Admission
from coserve.core.outputs import Outputs
from coserve.core.request import Request
from coserve.core.slo import LatencyTargets
from coserve.errors import QueueFull, TargetOutOfReach
from tests.core.arrivals import arrive, made, warm
from tests.core.simulation import PER_TOKEN, STEP_FLOOR, Simulation

TARGET = LatencyTargets(ttft=50e-3)


def warmed(**settings_: int) -> tuple[Simulation, Admission]:
    sim = Simulation(blocks=2000, **settings_)
    warm(sim)
    return sim, Admission(sim.scheduler)


def expect_outputs(sim: Simulation, tokens: int) -> None:
    """Lately answers were so long."""
    sim.scheduler.outputs = Outputs()
    sim.scheduler.outputs.tokens = tokens
    sim.scheduler.outputs.end()
    sim.scheduler.outputs.tokens = tokens


def first_token(sim: Simulation, request: Request) -> float:
    """Seconds from a request's arrival to its first token."""
    while request.num_output_tokens == 0:
        sim.step()
    return sim.now - request.arrival


def test_a_queue_that_takes_too_long_is_refused_with_the_time_that_is_missing() -> None:
    sim, admission = warmed(max_num_seqs=64)
    for number in range(10):
        arrive(sim, f"ahead {number}", 60, 1)
    request = made(sim, "late", 20, 1, targets=TARGET)
    with pytest.raises(TargetOutOfReach) as refusal:
        admission.check(request, sim.now)
    total = 620 / 64 * (STEP_FLOOR + 64 * PER_TOKEN)
    assert refusal.value.retry_after == pytest.approx(total / 0.9 - TARGET.ttft, rel=0.2)
    sim.scheduler.add(request)
    assert first_token(sim, request) == pytest.approx(TARGET.ttft + refusal.value.retry_after, rel=0.2)


def test_without_a_target_nobody_is_refused() -> None:
    sim, admission = warmed()
    for number in range(200):
        arrive(sim, f"ahead {number}", 60, 5)
    admission.check(made(sim, "patient", 20, 5), sim.now)
    admission.check(made(sim, "paced", 20, 5, targets=LatencyTargets(tpot=1e-6)), sim.now)


def test_before_the_model_knows_nobody_is_refused() -> None:
    sim = Simulation()
    for number in range(50):
        arrive(sim, f"ahead {number}", 60, 5)
    Admission(sim.scheduler).check(made(sim, "early", 20, 5, targets=TARGET), sim.now)


def test_a_prompt_too_long_for_its_target_is_let_in_when_the_queue_is_short() -> None:
    sim, admission = warmed(max_num_seqs=64)
    arrive(sim, "ahead", 60, 1)
    admission.check(made(sim, "long", 5000, 1, targets=TARGET), sim.now)
    for number in range(20):
        arrive(sim, f"ahead {number}", 60, 1)
    with pytest.raises(TargetOutOfReach):
        admission.check(made(sim, "long too", 5000, 1, targets=TARGET), sim.now)


def test_a_request_of_higher_priority_is_judged_by_those_before_it() -> None:
    sim, admission = warmed(max_num_seqs=64)
    for number in range(20):
        arrive(sim, f"ahead {number}", 60, 1)
    admission.check(made(sim, "first", 20, 1, targets=TARGET, priority=-1), sim.now)
    with pytest.raises(TargetOutOfReach):
        admission.check(made(sim, "last", 20, 1, targets=TARGET), sim.now)


def test_a_prompt_in_the_prefix_cache_costs_its_rest_only() -> None:
    sim, admission = warmed(max_num_seqs=64, prefix_caching=True)
    arrive(sim, "same", 1000, 1)
    sim.run()
    arrive(sim, "ahead", 60, 1)
    total, own = admission.predict(made(sim, "again", 1000, 1, targets=TARGET), sim.now)
    assert own <= total < TARGET.ttft
    sim.pool.cache = None
    assert admission.predict(made(sim, "never seen", 1000, 1, targets=TARGET), sim.now)[1] > TARGET.ttft


def test_a_full_house_is_predicted_from_how_long_requests_lately_took() -> None:
    sim, admission = warmed(max_num_seqs=4)
    for number in range(4):
        arrive(sim, f"running {number}", 8, 400)
    for _ in range(5):
        sim.step()
    expect_outputs(sim, 400)
    with pytest.raises(TargetOutOfReach):
        admission.check(made(sim, "fifth", 8, 4, targets=LatencyTargets(ttft=0.2)), sim.now)
    admission.check(made(sim, "fifth", 8, 4, targets=LatencyTargets(ttft=2.0)), sim.now)


def test_the_queue_is_bounded_and_a_burst_into_free_slots_is_no_queue() -> None:
    sim = Simulation(max_num_seqs=4, max_tokens=512)
    admission = Admission(sim.scheduler, max_queued=2)
    for number in range(6):
        admission.check(made(sim, f"burst {number}", 4, 30), sim.now)
        arrive(sim, f"burst {number}", 4, 30)
    with pytest.raises(QueueFull) as refusal:
        admission.check(made(sim, "seventh", 4, 30), sim.now)
    assert "--max-num-queued-reqs is 2" in refusal.value.message
    sim.step()
    with pytest.raises(QueueFull):
        admission.check(made(sim, "seventh", 4, 30), sim.now)
    sim.run()
    admission.check(made(sim, "later", 4, 30), sim.now)


def test_what_could_be_met_is_known_after_some_steps() -> None:
    sim = Simulation()
    admission = Admission(sim.scheduler)
    assert admission.least_targets() is None
    warm(sim)
    least = admission.least_targets()
    assert least is not None
    assert least.tpot == pytest.approx((STEP_FLOOR + PER_TOKEN) / 0.9, rel=0.1)
    assert least.ttft == pytest.approx((STEP_FLOOR + 16 * PER_TOKEN) / 0.9, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 150), min_size=1, max_size=30),
    gaps=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=30, max_size=30),
    ttft=st.sampled_from([15e-3, 30e-3, 80e-3]),
)
def test_whoever_is_let_in_gets_its_first_token_in_time(prompts, gaps, ttft) -> None:
    """Whenever the model says that the target can be met it is: those who come later don't fill up the step
    that brings the token until it is late."""
    sim, admission = warmed(max_num_seqs=64)
    targets = LatencyTargets(ttft=ttft)
    let_in: list[Request] = []
    first: dict[str, float] = {}

    def step() -> None:
        if sim.scheduler.has_requests:
            sim.step()
        first.update({r.sequence_id: sim.now for r in let_in if r.finished and r.sequence_id not in first})

    for number, (prompt, gap) in enumerate(zip(prompts, gaps, strict=False)):
        request = made(sim, f"r{number:02}", prompt, 1, targets=targets)
        try:
            admission.check(request, sim.now)
        except TargetOutOfReach as refusal:
            assert refusal.retry_after > 0.0
        else:
            sim.scheduler.add(request)
            let_in.append(request)
        for _ in range(gap):
            step()
    while sim.scheduler.has_requests:
        step()
    assert let_in
    for request in let_in:
        alone = STEP_FLOOR * -(-request.num_prompt_tokens // 64) + PER_TOKEN * request.num_prompt_tokens
        allowed = ttft if alone <= ttft else ttft + alone
        assert first[request.sequence_id] - request.arrival <= 1.1 * allowed


def overload(
    load: float, admitting: bool, seconds: float = 8.0, training: bool = False
) -> tuple[float, float, float]:
    """Poisson arrivals at `load` times what 16 places can serve: shares of them that were refused, that had
    their first token in 0.3 s, and of those let in that had it."""
    sim, admission = warmed(max_num_seqs=16, max_tokens=256)
    if training:
        sim.job("job", [512] * 2000, slabs=20)
    draw = random.Random(1)
    service = 60 * (STEP_FLOOR + 16 * PER_TOKEN) / 16 + 100 * PER_TOKEN
    start, arrivals = sim.now, [sim.now]
    while arrivals[-1] < start + seconds:
        arrivals.append(arrivals[-1] + draw.expovariate(load / service))
    let_in: list[Request] = []
    first: dict[str, float] = {}
    waiting = arrivals[::-1]
    while waiting or sim.scheduler.has_requests:
        while waiting and waiting[-1] <= sim.now:
            output = max(1, int(draw.expovariate(1 / 60)))
            name, targets = f"r{len(waiting):05}", LatencyTargets(ttft=0.3)
            request = made(sim, name, draw.randint(10, 190), output, targets=targets)
            request.arrival = waiting.pop()
            try:
                if admitting:
                    admission.check(request, sim.now)
            except TargetOutOfReach:
                continue
            sim.scheduler.add(request)
            let_in.append(request)
        if not sim.scheduler.has_requests:
            sim.now = waiting[-1]
            continue
        sim.step()
        for request in let_in[-400:]:
            if request.num_output_tokens and request.sequence_id not in first:
                first[request.sequence_id] = sim.now - request.arrival
    good = sum(seconds <= 0.3 for seconds in first.values())
    return 1 - len(let_in) / len(arrivals), good / len(arrivals), good / len(let_in)


def test_under_overload_those_let_in_keep_their_target_and_without_it_nobody_does() -> None:
    refused, good, kept = overload(2.0, admitting=True)
    assert 0.4 < refused < 0.6 and good > 0.48 and kept > 0.92
    refused, good, kept = overload(4.0, admitting=True)
    assert good > 0.22 and kept > 0.85
    assert overload(2.0, admitting=False)[1] < 0.1
    refused, good, _ = overload(0.5, admitting=True)
    assert refused == 0.0 and good > 0.99


def test_whoever_comes_back_when_it_was_told_to_is_let_in() -> None:
    """A hundred at once, and the refused come again after their Retry-After: with one time for all of them
    they came together again, twelve times on average."""
    sim, admission = warmed(max_num_seqs=16, max_tokens=256)
    draw, targets = random.Random(3), LatencyTargets(ttft=0.3)
    coming = [(sim.now, number, 0) for number in range(100)]
    refusals: list[int] = []
    let_in: list[Request] = []
    first: dict[str, float] = {}
    while coming or sim.scheduler.has_requests:
        coming.sort(reverse=True)
        while coming and coming[-1][0] <= sim.now:
            _, number, tries = coming.pop()
            request = made(sim, f"r{number}.{tries}", draw.randint(10, 190), 30, targets=targets)
            try:
                admission.check(request, sim.now)
            except TargetOutOfReach as refusal:
                assert 0.0 < refusal.retry_after <= MOST_RETRY
                coming.insert(0, (sim.now + refusal.retry_after, number, tries + 1))
                coming.sort(reverse=True)
                continue
            refusals.append(tries)
            sim.scheduler.add(request)
            let_in.append(request)
        if sim.scheduler.has_requests:
            sim.step()
        elif coming:
            sim.now = coming[-1][0]
        for request in let_in:
            if request.num_output_tokens and request.sequence_id not in first:
                first[request.sequence_id] = sim.now - request.arrival
    assert sum(refusals) / 100 < 1.5 and max(refusals) <= 5
    assert sum(seconds <= targets.ttft for seconds in first.values()) > 80
    assert sim.now < 3.0, "and the device was not kept idle for it"


def test_a_step_that_brings_a_first_token_is_not_filled_until_that_is_late() -> None:
    def widths(ttft: float) -> list[int]:
        sim = Simulation(blocks=2000, max_num_seqs=64, max_tokens=256)
        for size in (1, 8, 20, 40, 60, 120, 250, 12):
            arrive(sim, f"warm {size}", size, 2)
            sim.run()
        arrive(sim, "first", 60, 1, targets=LatencyTargets(ttft=ttft))
        for number in range(4):
            arrive(sim, f"later {number}", 100, 1)
        before = len(sim.plans)
        sim.run()
        return [plan.inference_tokens for plan in sim.plans[before:]]

    assert widths(ttft=1.0) == [256, 204], "there is time enough"
    narrow = widths(ttft=20e-3)
    assert 60 < narrow[0] <= (20e-3 - STEP_FLOOR) / PER_TOKEN and sum(narrow) == 460
    assert widths(ttft=5e-3) == [256, 204], "it is late anyway"


def test_training_gives_way_before_anybody_is_refused() -> None:
    alone = overload(1.1, admitting=True, seconds=4.0)
    beside = overload(1.1, admitting=True, seconds=4.0, training=True)
    assert beside[0] < alone[0] + 0.05 and beside[1] > alone[1] - 0.05


def test_training_comes_back_when_the_pressure_is_gone() -> None:
    sim, admission = warmed(max_num_seqs=2)
    sim.job("job", [512] * 200, slabs=20)
    for number in range(2):
        arrive(sim, f"running {number}", 8, 3000)
    for _ in range(40):
        sim.step()
    beside = max(plan.training_budget for plan in sim.plans[-20:])
    expect_outputs(sim, 500)
    with pytest.raises(TargetOutOfReach):
        admission.check(made(sim, "third", 8, 4, targets=TARGET), sim.now)
    refused_at = sim.now
    sim.step()
    assert sim.plans[-1].training_budget == 0.0 and not sim.plans[-1].training_backward
    while sim.now < refused_at + 5.5:
        sim.step()
    assert max(plan.training_budget for plan in sim.plans[-20:]) == pytest.approx(beside, rel=0.2)


def test_a_stall_is_forgotten_though_it_keeps_out_those_who_would_show_that() -> None:
    sim, admission = warmed(max_num_seqs=64)

    def refused() -> bool:
        try:
            request = made(sim, f"r{sim.now}", 60, 1, targets=TARGET)
            admission.check(request, sim.now)
        except TargetOutOfReach:
            return True
        sim.scheduler.add(request)
        return False

    for number in range(2):
        arrive(sim, f"ahead {number}", 60, 1)
    assert not refused()
    sim.now += 20.0
    sim.run()
    for number in range(2):
        arrive(sim, f"ahead {number + 2}", 60, 1)
    assert refused(), "the last first token came twenty seconds late"
    sim.now += 31.0
    assert not refused()


def test_memory_that_is_full_is_a_queue_too() -> None:
    sim = Simulation(blocks=64, max_num_seqs=16, max_tokens=256)
    warm(sim)
    admission = Admission(sim.scheduler)
    for number in range(3):
        arrive(sim, f"large {number}", 92, 30)
    sim.step()
    assert len(sim.scheduler.running) == 2, "there are places, but no memory"
    expect_outputs(sim, 30)
    with pytest.raises(TargetOutOfReach):
        admission.check(made(sim, "fourth", 80, 4, targets=TARGET), sim.now)
    sim.run()
    admission.check(made(sim, "fifth", 80, 4, targets=TARGET), sim.now)
