"""Absurd settings and exploding losses are told, in words that name the setting."""

from __future__ import annotations

import pytest

from coserve.training.divergence import LossWatch, settings_warnings
from coserve.training.job import TrainingSpec


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.5"),
        ({"learning_rate": 5e-3, "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio"),
        ({"optimizer": "sgd", "learning_rate": 1e6}, "sgd"),
        ({"learning_rate": 1e-12}, "hardly changes"),
        ({"learning_rate": 1e-3, "weight_decay": 2e3}, "weight_decay"),
    ],
)
def test_absurd_settings_are_told(settings: dict[str, object], said: str) -> None:
    (warning,) = settings_warnings(TrainingSpec(**settings))
    assert said in warning


@pytest.mark.parametrize(
    "settings",
    [{}, {"learning_rate": 5e-3}, {"optimizer": "sgd", "learning_rate": 1.0}, {"loraplus_lr_ratio": 16.0}],
)
def test_usual_settings_are_not(settings: dict[str, object]) -> None:
    assert settings_warnings(TrainingSpec(**settings)) == []


def test_an_exploding_loss_is_told_once_each_time() -> None:
    watch = LossWatch(6.9)
    losses = [2.0, 5.0, 7.5, 30.0, 3.0, 8.0]
    said = [watch.warning(step, loss) for step, loss in enumerate(losses, 1)]
    assert [text is not None for text in said] == [False, False, True, False, False, True]
    assert "Step 3" in str(said[2]) and "learning rate" in str(said[2])


def test_a_start_worse_than_guessing_is_no_explosion() -> None:
    watch = LossWatch(2.3)
    assert [watch.warning(step, loss) for step, loss in enumerate([5.0, 6.0, 9.0], 1)] == [None] * 3
    assert watch.warning(4, 11.0) is not None
