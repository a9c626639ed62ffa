"""Calls beside a forward cost what they add to it: the model learns what is concealed, and plans with it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.calls_beside import calls_beside
from coserve.core.latency_model import LatencyModel
from coserve.core.slo import CALLS_BESIDE, LONGEST
from coserve.core.span import SpanKind, TrainingSpan
from coserve.core.step_plan import StepPlan
from tests.core.simulation import Simulation


def memory(context: int) -> float:
    """Seconds of a forward that waits for weights and keys."""
    return 4e-3 + 2e-7 * context


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(0.05, 0.2))
def test_what_a_forward_conceals_is_learnt_from_steps_with_calls_beside(part: float, ahead: float) -> None:
    """Each step carries what is known to be concealed and a little more, as the scheduler plans it; after the
    first few, steps take no longer than that little more."""
    model = LatencyModel(overlaps=True)
    for step in range(40):
        rows, context = 20 + step * 7 % 30, 5000 + step * 131 % 9000
        model.observe_inference(rows, context, memory(context))
    assert model.idle_seconds(30, 8000) == 0.0, "nothing ran beside yet"
    for step in range(300):
        rows, context = 20 + step * 7 % 30, 5000 + step * 131 % 9000
        alone, busy = memory(context), part * memory(5000) * rows / 50
        work = model.idle_seconds(rows, context) + ahead * alone
        seconds = max(alone, busy + work)
        assert step < 10 or seconds <= 1.1 * (1.0 + ahead) * alone
        model.observe_step(rows, context, 0, work, seconds)
    for rows, context in ((22, 6000), (35, 9000), (48, 12000)):
        idle = memory(context) - part * memory(5000) * rows / 50
        assert model.idle_seconds(rows, context) == pytest.approx(idle, rel=0.1, abs=3e-4)


def test_where_calls_lengthen_the_step_by_themselves_nothing_is_concealed() -> None:
    model = LatencyModel(overlaps=True)
    for step in range(40):
        model.observe_inference(20 + step % 8, 4000, memory(4000))
    for step in range(60):
        model.observe_step(20 + step % 8, 4000, 0, 1e-3, memory(4000) + 1e-3)
    assert model.idle_seconds(24, 4000) < 0.02 * memory(4000)


def test_windows_that_the_forward_conceals_are_not_taken_for_free() -> None:
    """Rows of 0.02 ms of arithmetic in a forward of 5 ms: hidden by themselves, seen where calls beside fill
    the rest."""
    model = LatencyModel(overlaps=True)
    for _ in range(40):
        model.observe_inference(24, 5000, 5e-3)
    assert model.window_seconds(64, 24, 5000) == 0.0, "nothing was shown"
    assert model.window_rows_within(1.0, 24, 5000) == 0
    model.observe_step(24, 5000, 64, 0.0, 5e-3)
    assert 88 <= model.window_rows_within(1.0, 24, 5000) <= 176, "twice as many as were seen, at most"
    for step in range(200):
        rows, work = (0, 64, 128)[step % 3], min(0.1e-3 * step, 4.5e-3)
        model.observe_step(24, 5000, rows, work, max(5e-3, 2e-5 * (24 + rows) + work))
    for rows in (64, 128):
        assert model.window_seconds(rows, 24, 5000) == pytest.approx(2e-5 * rows, rel=0.2)
    model.observe_step(24, 5000, 64, 0.0, 5e-3)
    assert model.window_seconds(64, 24, 5000) == pytest.approx(64 * 2e-5, rel=0.2), "concealed again: no news"


def test_calls_run_beside_requests_once_their_cost_is_known() -> None:
    sim = Simulation(blocks=400, tpot=20e-3)
    (sequence,) = sim.job("job", [256])
    queue, model = sim.scheduler.training, sim.model
    plan = StepPlan(training_backward=[TrainingSpan(SpanKind.TRAIN_BACKWARD, sequence, 0, 12)])
    plan.training_budget = 10e-3
    model.observe_unit("loss", 64, 1e-3)
    assert calls_beside(plan, queue, model) == [], "no forward without requests"
    request = sim.request("r", 4, 4)
    plan.inference = [sim.scheduler._span(request, 4)]
    first = calls_beside(plan, queue, model)
    assert [(call.kind, call.tokens) for call in first] == [("loss", 64)] * 4, "a layer's cost is unknown"
    kind = sequence.unit_kind(4)
    model.observe_unit(kind, 64, 1e-3)
    assert len(calls_beside(plan, queue, model)) == CALLS_BESIDE
    assert len(calls_beside(plan, queue, model, 3)) == 3
    assert sum(call.seconds for call in first) == pytest.approx(4e-3)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from([8e-3, 12e-3]))
def test_training_beside_takes_what_is_idle_and_the_target_is_kept(idle: float, tpot: float) -> None:
    """On a device whose forward leaves `idle` of its time to other arithmetic."""
    trained = []
    for part in (0.0, idle):
        sim = Simulation(blocks=4000, max_num_seqs=16, max_tokens=512, tpot=tpot)
        sim.costs, sim.model.overlaps = Overlapping(part), True
        for name in ("a", "b", "c", "d"):
            sim.request(name, 8, 1200)
        sim.job("job", [512] * 200, slabs=10)
        for _ in range(300):
            sim.step()
        began, before, late, answered = sim.now, sim.training_seconds, 0, sim.answered
        for _ in range(300):
            plan = sim.step()
            late += sim.answered - answered > max(plan.inference_alone, LONGEST * tpot) + UNIT
            answered = sim.answered
        assert late <= 3 and sim.now - began <= 300 * tpot
        trained.append((sim.training_seconds - before) / (sim.now - began))
    assert trained[1] > trained[0] + 0.4 * idle


UNIT = 64 * 1e-5 * 2.0


class Overlapping:
    """A forward of 6 ms whatever its rows, of which `part` is left to what runs beside; rows of windows take
    their arithmetic of it first."""

    layers, overhead, launch, calls_beside = 2, 0.0, 0.0, CALLS_BESIDE

    def __init__(self, part: float) -> None:
        self.part = part

    def forward(self, inference, windows) -> tuple[float, float]:
        busy = 6e-3 * (1.0 - self.part) * bool(inference) + 2e-5 * sum(w.length for w in windows)
        seconds = max(6e-3 if inference else 0.0, busy)
        return seconds, seconds - busy

    def unit(self, kind: str, tokens: int, context: int) -> float:
        return 1e-5 * tokens * (2.0 if kind == "layer_c" else 1.0)
