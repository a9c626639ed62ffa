"""Optimizer steps and microbatches follow from data and settings alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.errors import InvalidRequest
from coserve.training.batching import BatchPlan, epoch_order, pack
from coserve.training.job import TrainingSpec


class Lengths:
    """A data set of which only lengths matter; every token but the first is trained."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.lengths[index], np.int32), np.zeros(self.lengths[index], np.int32)

    def trained_tokens(self, index: int) -> int:
        return self.lengths[index] - 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_keeps_order_and_limit(lengths: list[int], limit: int) -> None:
    runs = pack(lengths, limit)
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    for run, after in zip(runs, [*runs[1:], None]):
        assert len(run) == 1 or sum(lengths[i] for i in run) <= limit
        if after is not None:
            assert sum(lengths[i] for i in run) + lengths[after[0]] > limit


def test_each_epoch_visits_every_example_once_in_its_own_order() -> None:
    plan = BatchPlan(Lengths([5] * 11), TrainingSpec(n_epochs=3, batch_size=4), seed=7)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 9)
    epochs = [[i for step in range(3 * e + 1, 3 * e + 4) for i in plan.step(step).examples] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [plan.step(step).epoch for step in (3, 9)] == [1.0, 3.0]
    last = plan.step(3)
    assert (len(last.examples), last.tokens, last.trained_tokens) == (3, 15, 12)


def test_order_depends_on_seed_and_epoch_only() -> None:
    assert epoch_order(20, 1, 0, True) == epoch_order(20, 1, 0, True)
    assert epoch_order(20, 1, 0, True) != epoch_order(20, 2, 0, True)
    assert epoch_order(20, 1, 0, False) == list(range(20))


def test_the_permutation_is_written_down() -> None:
    assert epoch_order(8, 3, 1, True) == [5, 6, 3, 7, 0, 1, 2, 4]


def test_steps_may_be_asked_in_any_order() -> None:
    plan = BatchPlan(Lengths([3, 9, 4, 7, 5]), TrainingSpec(batch_size=2, max_steps=8), seed=0)
    forward = [plan.step(step) for step in range(1, 9)]
    assert [plan.step(step) for step in range(8, 0, -1)] == forward[::-1]
    assert plan.total_steps == 8


def test_long_examples_get_microbatches_of_their_own() -> None:
    plan = BatchPlan(
        Lengths([30, 100, 30, 30]), TrainingSpec(batch_size=4, shuffle=False), seed=0, microbatch_tokens=64
    )
    assert plan.step(1).microbatches == ((0,), (1,), (2, 3))


def test_an_example_over_the_models_context_is_refused() -> None:
    plan = BatchPlan(Lengths([4, 9, 5]), TrainingSpec(shuffle=False), seed=0, max_length=8)
    with pytest.raises(InvalidRequest, match=r"example 1 .* 9 tokens"):
        plan.step(1)


def test_data_that_trains_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no example"):
        BatchPlan(Lengths([]), TrainingSpec(), seed=0)
    plan = BatchPlan(Lengths([4, 1]), TrainingSpec(shuffle=False), seed=0)
    with pytest.raises(InvalidRequest, match="example 1 "):
        plan.step(1)
