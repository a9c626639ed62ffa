"""Learning rates against transformers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from coserve.errors import InvalidRequest
from coserve.training.job import TrainingSpec
from coserve.training.schedule import DECAY_PART, MIN_RATE, SCHEDULES, Schedule

TOTAL = 37
OWN_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr_rate": MIN_RATE},
    "cosine_warmup_with_min_lr": {"min_lr_rate": MIN_RATE},
    "warmup_stable_decay": {"num_decay_steps": math.ceil(TOTAL * DECAY_PART)},
}


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_transformers(name: str, warmup: int) -> None:
    ours = Schedule(TrainingSpec(learning_rate=3e-4, lr_scheduler_type=name, warmup_steps=warmup), TOTAL)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(name, optimizer, warmup, TOTAL, OWN_ARGUMENTS.get(name))
    for step in range(1, TOTAL + 1):
        assert ours.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        theirs.step()


def test_warmup_steps_win_over_the_ratio_which_rounds_up() -> None:
    assert Schedule(TrainingSpec(warmup_ratio=0.03), 34).warmup_steps == 2
    assert Schedule(TrainingSpec(warmup_ratio=0.5, warmup_steps=0), 34).warmup_steps == 0
    assert Schedule(TrainingSpec(lr_scheduler_type="constant", warmup_steps=9), 34).warmup_steps == 0


@pytest.mark.parametrize("name", ["step", "reduce_lr_on_plateau", "greedy"])
def test_other_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}'.*warmup_stable_decay") as caught:
        Schedule(TrainingSpec(lr_scheduler_type=name), 10)
    assert caught.value.param == "training.lr_scheduler_type"


def test_polynomial_needs_room_above_its_end() -> None:
    with pytest.raises(InvalidRequest, match="polynomial"):
        Schedule(TrainingSpec(lr_scheduler_type="polynomial", learning_rate=1e-8), 10)
