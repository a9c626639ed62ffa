"""Tenants share the device by weight over served tokens; priorities go first; nobody starves."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.arrivals import arrive
from tests.core.simulation import Simulation
from tests.core.test_fairness import Jobs


def served(sim: Simulation, start: int = 0) -> Counter[str]:
    """Tokens of each tenant's spans in the plans from `start` on."""
    counts: Counter[str] = Counter()
    for plan in sim.plans[start:]:
        for span in plan.inference:
            counts[span.request.tenant] += span.length
    return counts


def flood(sim: Simulation, tenant: str, count: int, weight: float = 1.0, output: int = 20) -> None:
    for number in range(count):
        arrive(sim, f"{tenant} {number:03}", 20, output, tenant=tenant, weight=weight)


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    sim = Simulation(max_num_seqs=4, blocks=400)
    flood(sim, "loud", 60)
    for _ in range(10):
        sim.step()
    quiet = arrive(sim, "quiet", 20, 4, tenant="quiet")
    while not quiet.finished:
        sim.step()
    waiting = sum(r.tenant == "loud" for r in sim.scheduler.waiting)
    assert waiting > 40, "it went before most of those that came earlier"


def submit_for(sim: Simulation, tenants: dict[str, tuple[str, float]]) -> Jobs:
    """Jobs whose optimizer steps are submitted for these tenants with these shares."""
    jobs, plain = Jobs(sim), sim.scheduler.training.submit

    def submit(job_id, sequences, priority=0):
        plain(job_id, sequences, priority, *tenants[job_id])

    sim.scheduler.training.submit = submit  # type: ignore[method-assign]
    return jobs


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_jobs_of_a_tenant_divide_its_share(share: float) -> None:
    sim = Simulation(blocks=400)
    jobs = submit_for(sim, {"a1": ("a", share), "a2": ("a", share), "a3": ("a", share), "b": ("b", 1.0)})
    for name in ("a1", "a2", "a3", "b"):
        jobs.add(name, "many small")
    jobs.run(until=8.0)
    *mine, other = jobs.shares("a1", "a2", "a3", "b")
    assert sum(mine) / other == pytest.approx(share, rel=0.1)
    assert max(mine) < 1.15 * min(mine)


def test_jobs_of_one_tenant_share_as_before() -> None:
    sim = Simulation(blocks=400)
    jobs = submit_for(sim, {"a1": ("a", 5.0), "a2": ("a", 5.0)})
    jobs.add("a1", "many small")
    jobs.add("a2", "many small", priority=1)
    jobs.run(until=4.0)
    assert jobs.shares("a1", "a2") == pytest.approx([2 / 3, 1 / 3], abs=0.04)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_waiting_tenants_are_served_by_weight(weight: float) -> None:
    sim = Simulation(max_num_seqs=8, blocks=400)
    flood(sim, "a", 120, weight)
    flood(sim, "b", 120)
    while all(any(r.tenant == t for r in sim.scheduler.waiting) for t in "ab"):
        sim.step()
    counts = served(sim)
    assert counts["a"] / counts["b"] == pytest.approx(weight, rel=0.25)


def test_a_tenant_that_was_away_saved_nothing_up() -> None:
    sim = Simulation(max_num_seqs=4, blocks=400)
    flood(sim, "a", 80)
    flood(sim, "b", 3)
    while any(r.tenant == "b" for r in (*sim.scheduler.waiting, *sim.scheduler.running)):
        sim.step()
    for _ in range(100):
        sim.step()
    start = len(sim.plans)
    flood(sim, "b", 80)
    for _ in range(120):
        sim.step()
    counts = served(sim, start)
    assert counts["b"] / counts["a"] == pytest.approx(1.0, rel=0.3)


def test_priorities_go_before_shares() -> None:
    sim = Simulation(max_num_seqs=1, blocks=400)
    flood(sim, "a", 10)
    arrive(sim, "b", 4, 2, tenant="b")
    urgent = arrive(sim, "a urgent", 4, 2, tenant="a", priority=-1)
    sim.step()
    assert sim.scheduler.running == [urgent]


def test_one_tenant_alone_goes_in_order_of_arrival() -> None:
    sim = Simulation(max_num_seqs=2, blocks=400)
    flood(sim, "a", 6)
    ended: list[str] = []
    while sim.scheduler.has_requests:
        before = {r.sequence_id for r in sim.scheduler.running}
        sim.step()
        ended += sorted(before - {r.sequence_id for r in sim.scheduler.running})
    assert ended == sorted(ended)


def test_under_pressure_the_tenant_that_had_more_gives_way() -> None:
    sim = Simulation(blocks=300, block_size=16, max_num_seqs=8, max_tokens=512)
    arrive(sim, "b 1", 16, 1, tenant="b")
    early = arrive(sim, "a early", 2000, 2400, tenant="a")
    late = arrive(sim, "b late", 400, 400, tenant="b")
    while not late.finished:
        sim.step()
    assert late.num_preemptions == 0 and early.num_preemptions >= 0
    sim.run()
    assert early.num_output_tokens == 2400


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 90),
            st.integers(1, 60),
            st.sampled_from("abc"),
            st.integers(-1, 1),
            st.integers(0, 4),
        ),
        max_size=20,
    ),
    weights=st.tuples(*[st.sampled_from([0.25, 1.0, 4.0])] * 3),
    blocks=st.integers(40, 60),
    grain=st.sampled_from([1.0, 16.0, 1024.0]),
)
def test_nobody_starves_under_pressure(requests, weights, blocks, grain) -> None:
    """A pool that holds little more than one request: everybody ends, and recomputing stays bounded."""
    sim = Simulation(blocks=blocks, max_num_seqs=6, max_tokens=48)
    weight = dict(zip("abc", weights, strict=True))
    owed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coserve.core.fair_shares.GRAIN", grain)
        for number, (prompt, output, tenant, priority, steps) in enumerate(requests):
            arrive(
                sim, f"r{number:02}", prompt, output, tenant=tenant, weight=weight[tenant], priority=priority
            )
            owed += prompt + output
            for _ in range(steps):
                if sim.scheduler.has_requests:
                    sim.step()
        bound = len(sim.plans) + 40 * (owed + 1)
        while sim.scheduler.has_requests:
            sim.step()
            assert len(sim.plans) < bound, "no progress"
    assert sim.pool.num_free == blocks
    for plan in sim.plans:
        assert len({r.sequence_id for r in plan.preempted}) == len(plan.preempted)


@pytest.mark.parametrize("tenants", ["a", "abc"])
def test_little_is_computed_again_under_pressure(tenants: str) -> None:
    """A pool for four of sixty requests that arrive at once; nothing is cached."""
    draw = random.Random(1)
    sim = Simulation(blocks=120, block_size=16, max_num_seqs=8, max_tokens=256)
    requests = [
        arrive(
            sim, f"r{i:02}", draw.randint(50, 500), draw.randint(50, 600), tenant=tenants[i % len(tenants)]
        )
        for i in range(60)
    ]
    while sim.scheduler.has_requests:
        sim.step()
    needed = sum(request.num_tokens for request in requests)
    assert sum(served(sim).values()) < 2.0 * needed
    assert 0 < sim.scheduler.num_preemptions < 120
    assert max(request.num_preemptions for request in requests) < 8
