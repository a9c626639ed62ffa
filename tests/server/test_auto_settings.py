"""What "auto" chooses, by the amount of data."""

from __future__ import annotations

import pytest

from coserve.server.application.auto_settings import batch_size, choose, epochs, learning_rate_multiplier
from coserve.training.job import TrainingSpec


@pytest.mark.parametrize(
    ("examples", "passes", "batch"),
    [
        (1, 25, 1),
        (10, 10, 1),
        (33, 3, 4),
        (34, 3, 4),
        (64, 3, 8),
        (4_000, 3, 8),
        (5_000, 3, 10),
        (8_333, 3, 16),
        (10_000, 2, 20),
        (10**6, 1, 64),
    ],
)
def test_epochs_and_batches(examples: int, passes: int, batch: int) -> None:
    assert (epochs(examples), batch_size(examples)) == (passes, batch)


def test_more_data_never_means_more_passes_or_smaller_batches() -> None:
    sizes = [1, 2, 5, 12, 40, 100, 1_000, 9_000, 30_000, 10**6]
    assert sorted(map(epochs, sizes), reverse=True) == list(map(epochs, sizes))
    assert sorted(map(batch_size, sizes)) == list(map(batch_size, sizes))


def test_the_learning_rate_goes_with_the_batch_and_the_method() -> None:
    assert learning_rate_multiplier(8, "supervised") == 1.0
    assert learning_rate_multiplier(1, "supervised") == 0.5
    assert learning_rate_multiplier(64, "dft") == 2.0
    assert learning_rate_multiplier(8, "dpo") == pytest.approx(0.1)


def test_only_what_is_asked_for_is_chosen() -> None:
    given = TrainingSpec(n_epochs=7, batch_size=3, learning_rate=1.0)
    assert choose(given, (), 10, 1000, "supervised") == given
    chosen = choose(given, ("learning_rate_multiplier",), 10, 1000, "supervised")
    assert (chosen.n_epochs, chosen.batch_size) == (7, 3)
    assert chosen.learning_rate == pytest.approx(2e-4 * 0.612)
    packed = TrainingSpec(packing=True, max_length=100)
    assert choose(packed, ("batch_size",), 1000, 1600, "supervised").batch_size == 2
