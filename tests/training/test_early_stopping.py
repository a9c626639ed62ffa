"""Which step is the best and when to stop, against transformers' EarlyStoppingCallback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from coserve.training.early_stopping import EvaluationState


def run(losses: list[float], patience: int, threshold: float = 0.0) -> list[EvaluationState]:
    states = [EvaluationState()]
    for step, loss in enumerate(losses, 1):
        states.append(states[-1].after(step, loss, patience, threshold))
    return states[1:]


@dataclass
class Peer:
    """The callback with the trainer's part around it: the best metric is noted after the callback ran."""

    patience: int
    threshold: float
    folder: str
    stopped_at: int = 0
    state: TrainerState = field(default_factory=TrainerState)

    def feed(self, losses: list[float]) -> None:
        callback = EarlyStoppingCallback(self.patience, self.threshold)
        args = TrainingArguments(
            output_dir=self.folder, metric_for_best_model="loss", greater_is_better=False, use_cpu=True
        )
        for step, loss in enumerate(losses, 1):
            control = TrainerControl()
            callback.on_evaluate(args, self.state, control, {"eval_loss": loss})
            if self.state.best_metric is None or loss < self.state.best_metric:
                self.state.best_metric, self.state.best_global_step = loss, step
            if control.should_training_stop:
                self.stopped_at = step
                return


@given(
    losses=st.lists(st.integers(1, 12).map(lambda n: n / 4), min_size=1, max_size=12),
    patience=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.25, 0.6]),
)
def test_stops_where_transformers_does(tmp_path_factory, losses, patience, threshold) -> None:
    peer = Peer(patience, threshold, str(tmp_path_factory.getbasetemp()))
    peer.feed(losses)
    states = run(losses, patience, threshold)
    stopped = next((state for state in states if state.stopped), None)
    assert (stopped.evaluated if stopped else 0) == peer.stopped_at
    last = stopped or states[-1]
    assert (last.best_loss, last.best_step) == (peer.state.best_metric, peer.state.best_global_step)


def test_patience_zero_never_stops() -> None:
    states = run([1.0, 2.0, 3.0, 4.0], 0)
    assert not any(state.stopped for state in states) and states[-1].best_step == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(bad: float) -> None:
    states = run([bad, 2.0, bad, bad], 2)
    assert [state.best_step for state in states] == [0, 2, 2, 2]
    assert states[-1].stopped and states[-1].best_loss == 2.0
