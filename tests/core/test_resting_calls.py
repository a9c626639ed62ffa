"""A call that rests goes on as it began, at the price of what is left of it, and before others of its job."""

from __future__ import annotations

import pytest

from coserve.core.training_plan import Beside
from coserve.core.training_queue import TrainingQueue
from coserve.core.training_sequence import RestingCall, TrainingSequence
from tests.core.simulation import Simulation

PIECE = 5e-3


def resting() -> tuple[TrainingQueue, TrainingSequence]:
    """Four units of 40 ms in all, of which 28 have run."""
    sim = Simulation(blocks=400)
    (sequence,) = sim.job("job", [256])
    sequence.cursor = 256
    for _ in range(20):
        for kind in ("loss", "layer_a", "layer_b", "layer_c"):
            sim.model.observe_unit(kind, 256, 40e-3)
    sequence.resting = RestingCall(4, 28e-3, PIECE)
    return sim.scheduler.training, sequence


def spans(queue: TrainingQueue, budget: float) -> list[tuple[int, int]]:
    plan = queue.plan(budget, 0, 8, Beside(1, 10))
    assert plan.spent <= max(budget, PIECE) + 1e-9, "no more than pieces that the budget pays"
    return [(span.start, span.length) for span in plan.backward.values()]


def test_it_keeps_its_length_and_costs_what_is_left() -> None:
    queue, sequence = resting()
    assert queue.call_length(sequence, 0, len(sequence.units), 1e-6) == 4
    assert queue.call_seconds(sequence, 0, 4) == pytest.approx(12e-3, rel=0.05)
    sequence.resting = RestingCall(4, 60e-3, PIECE)
    assert queue.call_seconds(sequence, 0, 4) == PIECE, "longer than was thought: another piece at least"


def test_beside_requests_it_goes_on_as_soon_as_a_piece_is_paid_for() -> None:
    queue, _ = resting()
    assert spans(queue, 6e-3) == [(0, 4)]
    queue, _ = resting()
    planned = [spans(queue, 2e-3) for _ in range(3)]
    assert planned == [[], [], [(0, 4)]], "by what was saved up"


def test_a_call_that_ended_or_lost_its_memory_rests_no_more() -> None:
    _, sequence = resting()
    sequence.pay_units(4)
    assert sequence.resting is None and sequence.unit_cursor == 4
    _, sequence = resting()
    sequence.restart()
    assert sequence.resting is None


def test_a_job_that_owes_an_update_has_work() -> None:
    queue, sequence = resting()
    sequence.pay_units(len(sequence.units))
    assert not queue.has_work
    queue.owe_update("job", True)
    assert queue.has_work
    queue.owe_update("job", False)
    assert not queue.has_work
    queue.owe_update("gone", True)
    assert not queue.has_work
