"""Optimizer steps and microbatches follow from data and settings alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.errors import InvalidRequest
from coserve.training.batching import BatchPlan, epoch_order, fill, pack
from coserve.training.job import TrainingSpec


class Lengths:
    """A data set of which only lengths matter; every token but the first is trained."""

    def __init__(self, lengths: list[int], pairs: bool = False) -> None:
        self.lengths = np.asarray(lengths)
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.lengths)

    def trained_tokens(self, index: int) -> int:
        return int(self.lengths[index]) - 1


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 60))
def test_runs_hold_all_and_no_two_would_fit_into_one(lengths: list[int], limit: int) -> None:
    runs = pack(lengths, limit)
    assert sorted(i for run in runs for i in run) == list(range(len(lengths)))
    assert all(run == sorted(run) for run in runs) and [run[0] for run in runs] == sorted(r[0] for r in runs)
    sums = [sum(lengths[i] for i in run) for run in runs]
    assert all(total <= limit or len(run) == 1 for run, total in zip(runs, sums))
    two = sorted(sums)[:2]
    assert len(two) < 2 or sum(two) > limit


def test_runs_are_as_full_as_a_best_fit_makes_them() -> None:
    assert pack([600, 600, 400, 300, 100], 1024) == [[0, 2], [1, 3, 4]]
    assert pack([7] * 4, 14) == [[0, 1], [2, 3]]


@given(LENGTHS, st.integers(1, 60))
def test_packs_are_filled_in_order(lengths: list[int], limit: int) -> None:
    starts = fill(np.asarray(lengths), limit).tolist()
    assert starts[0] == 0 and starts[-1] == len(lengths)
    for begin, end in pairwise(starts):
        total = sum(lengths[begin:end])
        assert begin < end and (total <= limit or end == begin + 1)
        assert end == len(lengths) or total + lengths[end] > limit


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
    first = epoch_order(20, 1, 0, True).tolist()
    assert epoch_order(20, 1, 0, True).tolist() == first != epoch_order(20, 2, 0, True).tolist()
    assert epoch_order(20, 1, 0, False).tolist() == list(range(20))


def test_the_permutation_is_written_down() -> None:
    assert epoch_order(8, 3, 1, True).tolist() == [5, 6, 3, 7, 0, 1, 2, 4]


def test_steps_may_be_asked_in_any_order() -> None:
    plan = BatchPlan(Lengths([3, 9, 4, 7, 5]), TrainingSpec(batch_size=2, max_steps=8), seed=0)
    forward = [plan.step(step) for step in range(1, 9)]
    assert [plan.step(step) for step in range(8, 0, -1)] == forward[::-1]
    assert plan.total_steps == 8


def test_long_examples_get_microbatches_of_their_own() -> None:
    plan = BatchPlan(
        Lengths([30, 100, 30, 30]), TrainingSpec(batch_size=4, shuffle=False), seed=0, microbatch_tokens=64
    )
    assert plan.step(1).microbatches == ((0, 2), (1,), (3,))


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


# ---------------------------------------------------------------- pairs


def test_a_batch_counts_pairs_and_a_microbatch_holds_them_whole() -> None:
    """Examples 2i and 2i + 1 side by side, in that order."""
    rng = np.random.default_rng(0)
    plan = BatchPlan(
        Lengths(rng.integers(2, 40, 22).tolist(), pairs=True),
        TrainingSpec(batch_size=4, n_epochs=2),
        seed=5,
        microbatch_tokens=64,
    )
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    seen = []
    for step in range(1, 4):
        for microbatch in plan.step(step).microbatches:
            assert all(
                chosen % 2 == 0 and rejected == chosen + 1
                for chosen, rejected in zip(microbatch[::2], microbatch[1::2], strict=True)
            )
            seen += microbatch
    assert sorted(seen) == list(range(22)) and seen != sorted(seen)


def test_pairs_are_not_packed() -> None:
    with pytest.raises(InvalidRequest, match="leave packing out"):
        BatchPlan(Lengths([4, 4], pairs=True), TrainingSpec(packing=True), seed=0, max_length=8)


# ---------------------------------------------------------------- packing


@given(LENGTHS, st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_packed_epochs_visit_every_example_once(
    lengths: list[int], batch_size: int, shuffle: bool, seed: int
) -> None:
    lengths = [n + 1 for n in lengths]
    spec = TrainingSpec(packing=True, max_length=60, batch_size=batch_size, n_epochs=3, shuffle=shuffle)
    plan = BatchPlan(Lengths(lengths), spec, seed, microbatch_tokens=64)
    steps = plan.steps_per_epoch
    assert plan.total_steps == 3 * steps
    for epoch in range(3):
        batches = [plan.step(epoch * steps + i + 1) for i in range(steps)]
        assert sorted(i for batch in batches for i in batch.examples) == list(range(len(lengths)))
        assert all(batch.tokens <= 60 * batch_size for batch in batches)
    assert batches[-1].epoch == 3.0


def test_a_batch_counts_packs() -> None:
    spec = TrainingSpec(packing=True, max_length=10, batch_size=2, shuffle=False)
    plan = BatchPlan(Lengths([4, 4, 4, 9, 2, 2, 2]), spec, seed=0)
    assert [plan.step(i).examples for i in (1, 2)] == [(0, 1, 2), (3, 4, 5, 6)]
    assert plan.steps_per_epoch == 2


def test_packs_fill_the_context_where_no_length_is_given() -> None:
    spec = TrainingSpec(packing=True, batch_size=1, shuffle=False)
    assert BatchPlan(Lengths([4] * 4), spec, seed=0, max_length=8).steps_per_epoch == 2
    with pytest.raises(InvalidRequest, match="packing needs a max_length"):
        BatchPlan(Lengths([4]), spec, seed=0)


def test_packs_are_drawn_from_the_seed() -> None:
    spec = TrainingSpec(packing=True, max_length=12, batch_size=1)
    of_seed = [
        [BatchPlan(Lengths([4] * 30), spec, seed).step(step).examples for step in range(1, 11)]
        for seed in (1, 1, 2)
    ]
    assert of_seed[0] == of_seed[1] != of_seed[2]
