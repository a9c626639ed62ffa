"""Each step keeps to the tightest of its requests' targets, and no longer than they are there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve.core.scheduler import Scheduler
from coserve.core.slo import LONGEST, LatencyTargets
from tests.core.arrivals import arrive, warm
from tests.core.simulation import Simulation

TIGHT, LOOSE = LatencyTargets(tpot=10e-3), LatencyTargets(tpot=60e-3)


def budgets(sim: Simulation, steps: int) -> list[float]:
    plans = [sim.step() for _ in range(steps)]
    return [plan.training_budget for plan in plans if plan.training_budget > 0.0]


def test_the_tightest_running_request_sets_the_budget() -> None:
    sim = Simulation(blocks=400, tpot=60e-3)
    warm(sim)
    sim.job("job", [512] * 60, slabs=20)
    arrive(sim, "loose", 8, 400)
    alone = max(budgets(sim, 20))
    short = arrive(sim, "tight", 8, 20, targets=TIGHT)
    sim.step()
    beside = max(budgets(sim, 15))
    while not short.finished:
        sim.step()
    after = max(budgets(sim, 20))
    assert beside < LONGEST * TIGHT.tpot < alone
    assert after == pytest.approx(alone, rel=0.2)


def test_a_class_without_a_target_is_automatic_beside_a_loose_server() -> None:
    sim = Simulation(blocks=400, tpot=60e-3)
    warm(sim)
    arrive(sim, "auto", 8, 40, targets=LatencyTargets())
    (demand,) = sim.scheduler.demands(sim.now)
    assert demand.targets == LatencyTargets() and not demand.decodes
    plan = sim.step()
    plan.inference_alone = 20e-3
    budget = sim.scheduler.budgets.wanted(plan, sim.scheduler.demands(sim.now), 0)
    least = sim.model.predict_inference(1, 1)
    automatic = LatencyTargets().training_budget(20e-3, 20e-3, 0.0, None, least=least)
    assert budget == pytest.approx(automatic, rel=0.3) and budget < 4e-3


def test_a_late_request_of_a_class_with_a_target_hurries_the_prompts_of_others() -> None:
    sim = Simulation(blocks=400, max_tokens=512)
    warm(sim)
    arrive(sim, "reader", 8, 300)
    sim.step()
    patient = sim.scheduler.prompt_tokens(1, 9, sim.now)
    arrive(sim, "hurried", 400, 4, targets=LatencyTargets(ttft=0.04))
    assert sim.scheduler.prompt_tokens(1, 9, sim.now + 0.06) > 1.5 * patient
    assert sim.scheduler.prompt_tokens(1, 9, sim.now + 0.01) == patient


def test_classes_that_only_wait_do_not_hold_back_the_prompts_beside_others() -> None:
    sim = Simulation(blocks=400, max_tokens=512, tpot=60e-3)
    warm(sim)
    arrive(sim, "reader", 8, 300)
    sim.step()
    before = sim.scheduler.prompt_tokens(1, 9, sim.now)
    arrive(sim, "tight", 400, 4, targets=TIGHT)
    assert sim.scheduler.prompt_tokens(1, 9, sim.now) == before


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_jobs_have_their_least_share_whatever_the_target(share: float) -> None:
    sim = Simulation(blocks=400, tpot=1e-3)
    sim.scheduler = Scheduler(
        replace(sim.scheduler.limits, min_training_share=share),
        sim.pool,
        sim.model,
        sim.scheduler.targets,
        sim.slots.unload,
        sim.slots.unload,
    )
    warm(sim)
    sim.job("job", [512] * 200, slabs=20)
    arrive(sim, "reader", 8, 600)
    start, trained = sim.now, sim.training_seconds
    for _ in range(550):
        sim.step()
    assert (sim.training_seconds - trained) / (sim.now - start) == pytest.approx(share, rel=0.05)
