"""The mean length of answers, from those that ended and those that run."""

from __future__ import annotations

import random

import pytest

from coserve.core.outputs import Outputs


def test_nothing_is_known_before_the_first_end() -> None:
    outputs = Outputs()
    outputs.tokens += 5
    assert outputs.mean == 0.0
    outputs.end()
    assert outputs.mean == pytest.approx(5.0, rel=0.1)


def test_it_settles_at_the_mean_whatever_runs_at_once() -> None:
    draw, outputs = random.Random(5), Outputs()
    left = [draw.expovariate(1 / 60) for _ in range(16)]
    seen = []
    for _ in range(4000):
        outputs.tokens += len(left)
        left = [rest - 1 for rest in left]
        for _ in [rest for rest in left if rest <= 0]:
            outputs.end()
        left = [rest if rest > 0 else draw.expovariate(1 / 60) for rest in left]
        seen.append(outputs.mean)
    assert sum(seen[500:]) / len(seen[500:]) == pytest.approx(60, rel=0.15)


def test_answers_that_grow_longer_are_seen_before_the_first_of_them_ends() -> None:
    outputs = Outputs()
    for _ in range(60):
        outputs.tokens += 12
        outputs.end()
    assert outputs.mean == pytest.approx(12, rel=0.1)
    outputs.tokens += 16 * 40  # sixteen run, none of them has ended after 40 tokens
    assert outputs.mean > 35
