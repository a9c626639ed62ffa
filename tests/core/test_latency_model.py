"""The latency model follows what it sees, and the targets turn it into a budget."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.core.latency_model import LatencyModel, LatencyState, UnitCost
from coserve.core.slo import (
    AUTO_FLOOR,
    AUTO_RATIO,
    LATEST,
    LONGEST,
    PACE,
    RISE_STEPS,
    BudgetControl,
    LatencyTargets,
    MinimumShare,
)


def learnt(floor: float, per_token: float, per_context: float) -> LatencyModel:
    """A model that has seen a device with these prices."""
    model = LatencyModel()
    for step in range(60):
        tokens, context = 1 + step * 7 % 23, 100 + step * 131 % 900
        model.observe_inference(tokens, context, floor + per_token * tokens + per_context * context)
    return model


@given(st.floats(1e-3, 5e-2), st.floats(1e-5, 1e-3), st.floats(0.0, 1e-5))
def test_a_linear_device_is_predicted(floor: float, per_token: float, per_context: float) -> None:
    model = learnt(floor, per_token, per_context)
    expected = floor + per_token * 12 + per_context * 500
    assert model.predict_inference(12, 500) == pytest.approx(expected, rel=0.02)


def test_it_follows_a_machine_that_slows_down() -> None:
    model = learnt(1e-3, 1e-4, 0.0)
    for step in range(400):
        tokens = 1 + step * 7 % 23
        model.observe_inference(tokens, 200, 2e-3 + 2e-4 * tokens)
    assert model.predict_inference(10, 200) == pytest.approx(4e-3, rel=0.05)


def test_one_stall_does_not_bend_it_but_shows_in_the_guard() -> None:
    model = learnt(2e-3, 1e-4, 0.0)
    before = model.predict_inference(8, 300)
    model.observe_inference(8, 300, 1.0)
    assert model.predict_inference(8, 300) < 1.5 * before
    assert model.guard > 1.0


def test_nothing_is_predicted_before_it_was_seen() -> None:
    model = LatencyModel()
    assert not model.trained
    assert model.predict_inference(4, 100) == 0.0 == model.predict_unit("layer_a", 64)


def test_unit_costs_carry_their_own_spread() -> None:
    steady, noisy = UnitCost(), UnitCost()
    for index in range(200):
        steady.update(1e-2, 64)
        noisy.update(1e-2 * (0.5 + index % 2), 64)
    assert steady.predict(64) == pytest.approx(1e-2, rel=1e-6)
    assert noisy.predict(64) > 1.5e-2


@given(st.floats(1e-4, 2e-2), st.floats(1e-6, 1e-3))
def test_calls_of_two_widths_tell_the_floor_from_the_price(floor: float, price: float) -> None:
    cost = UnitCost()
    assert cost.predict(64) == 0.0 and cost.tokens_within(1.0) == 0
    cost.update(floor + price * 256, 256)
    assert cost.predict(64) == pytest.approx((floor + price * 256) / 4), "one width: it is all price"
    for index in range(80):
        tokens = (64, 256)[index % 2]
        cost.update(floor + price * tokens, tokens)
    assert cost.deviation < 0.1
    for tokens in (16, 64, 128, 256):
        assert cost.predict(tokens) == pytest.approx(floor + price * tokens, rel=0.15)
    assert abs(cost.tokens_within(cost.predict(192)) - 192) <= 1


@given(st.floats(1e-4, 2e-2), st.floats(1e-6, 1e-3), st.floats(1e-3, 1e-1))
def test_calls_that_nobody_waits_for_are_short_but_waste_little(
    floor: float, price: float, seconds: float
) -> None:
    cost = UnitCost()
    assert cost.unhurried_tokens(seconds, 256) == 256
    for index in range(80):
        tokens = (64, 256)[index % 2]
        cost.update(floor + price * tokens, tokens)
    tokens = cost.unhurried_tokens(seconds, 256)
    assert 0 <= tokens <= 256
    if tokens < 256:
        assert floor / tokens + price <= 1.06 * (floor / 256 + price)
    if floor + price * tokens > 1.1 * seconds:
        fewer = 0.8 * (tokens - 1)  # which is rounded up
        assert floor / fewer + price > 1.04 * (floor / 256 + price), "fewer would waste too much"


@pytest.mark.parametrize(
    ("targets", "alone", "expected"),
    [
        (LatencyTargets(tpot=0.05), 0.02, PACE * 0.05 - 0.02),
        (LatencyTargets(tpot=0.05), 0.06, 0.0),
        (LatencyTargets(), 0.1, 0.2 * 0.1),
        (LatencyTargets(), 0.002, AUTO_FLOOR - 0.002),
    ],
)
def test_the_target_leaves_the_rest_to_training(
    targets: LatencyTargets, alone: float, expected: float
) -> None:
    assert targets.training_budget(alone, alone, 0.0, None) == pytest.approx(expected)


def test_training_moves_however_unsure_the_model_is() -> None:
    auto, explicit = LatencyTargets(), LatencyTargets(tpot=0.15)
    assert auto.training_budget(0.1, 0.1, 0.05, None) == pytest.approx(0.015)
    for guard in (0.1, 3.0):
        assert auto.training_budget(0.1, 0.1, guard, None) == pytest.approx(0.01)
        assert explicit.training_budget(0.1, 0.1, guard, None) == pytest.approx(PACE * 0.15 - 0.11)


def test_the_automatic_ratio_falls_with_the_load() -> None:
    """A queue's waits, not a step, are kept to the ratio: none of it is left where rows take all the time."""
    targets = LatencyTargets()
    budgets = [targets.training_budget(0.1, 0.1, 0.0, None, least=part * 0.1) for part in (1.0, 0.5, 0.25)]
    assert budgets[0] == pytest.approx(0.02)
    for budget, load in zip(budgets, (0.0, 0.5, 0.75), strict=True):
        longer = 1.0 + budget / 0.1
        assert longer * (1.0 - load) / (1.0 - load * longer) == pytest.approx(AUTO_RATIO)
    assert targets.training_budget(0.1, 0.1, 0.0, None, least=1e-9) == pytest.approx(0.0, abs=1e-6)


def test_what_earlier_gaps_left_or_took_is_settled_by_the_next_ones() -> None:
    targets = LatencyTargets(tpot=0.05)
    pace = PACE * 0.05
    assert targets.due(1.0, 4) == pytest.approx(1.0 + 4 * pace)
    assert targets.training_budget(0.02, 0.01, 0.0, None, 0.02) == pytest.approx(pace - 0.01)
    assert targets.training_budget(0.02, 0.01, 0.0, None, 0.015) == pytest.approx(pace - 0.015)
    assert targets.training_budget(0.02, 0.01, 0.0, None, -0.03) == 0.0
    assert targets.training_budget(0.02, 0.01, 0.0, None, 0.8) == pytest.approx(LONGEST * 0.05 - 0.01)


def test_a_request_that_fell_far_behind_starts_its_pace_again() -> None:
    targets = LatencyTargets(tpot=0.05)
    assert targets.pace(None, 0, 7.0) == 7.0
    assert targets.pace(1.0, 4, 1.0 + 5 * PACE * 0.05) == 1.0
    later = targets.pace(1.0, 4, 90.0)
    assert targets.due(later, 4) == pytest.approx(90.0 - LATEST * 0.05)
    assert LatencyTargets().pace(1.0, 4, 90.0) == 1.0


def test_a_first_token_that_runs_late_takes_the_budget() -> None:
    targets = LatencyTargets(ttft=0.2, tpot=0.1)
    assert targets.training_budget(0.02, 0.02, 0.0, 0.0) == pytest.approx(PACE * 0.1 - 0.02)
    assert targets.training_budget(0.02, 0.02, 0.0, 0.15) == pytest.approx(0.01)
    assert targets.training_budget(0.02, 0.02, 0.0, 0.5) == 0.0


def roofline(tokens: int, context: int) -> float:
    """Bound by memory up to 20 rows, then by arithmetic."""
    return 2e-3 + max(0.03, 1.5e-3 * tokens) + 2e-6 * context


def test_prompts_are_predicted_long_after_the_last_one() -> None:
    model = LatencyModel()
    for step in range(40):
        model.observe_inference(100 + step * 37 % 300, 400, roofline(100 + step * 37 % 300, 400))
    for step in range(2000):
        tokens, context = 1 + step % 8, 500 + step * 31 % 2000
        model.observe_inference(tokens, context, roofline(tokens, context))
    for tokens, context in ((4, 1000), (150, 400), (350, 400)):
        assert model.predict_inference(tokens, context) == pytest.approx(roofline(tokens, context), rel=0.1)


def test_tokens_within_a_time_fit_it_and_twice_as_many_do_not() -> None:
    model = learnt(1e-2, 1e-3, 0.0)
    more = model.tokens_within(0.05, 4, 500)
    assert model.predict_inference(4 + more, 500 + more) <= 0.05
    assert model.predict_inference(4 + more + 8, 500 + more + 8) > 0.05
    assert model.tokens_within(0.012, 4, 500) == 0


def test_a_prompt_takes_more_of_a_step_the_longer_somebody_waits() -> None:
    targets = LatencyTargets()
    assert targets.prompt_limit(0.04, None) == targets.prompt_limit(0.04, 0.1) == pytest.approx(0.12)
    assert targets.prompt_limit(0.04, 1.0) == pytest.approx(0.24)
    assert targets.prompt_limit(0.04, 5.0) == targets.prompt_limit(0.04, 50.0) == pytest.approx(0.3)
    explicit = LatencyTargets(tpot=0.05)
    assert explicit.prompt_limit(0.04, 10.0) == pytest.approx(PACE * 0.05)


def test_a_prompts_part_leaves_the_readers_their_pace() -> None:
    targets = LatencyTargets(tpot=0.05)
    assert targets.prompt_limit(0.02, None, early=0.03) == 0.03
    assert targets.prompt_limit(0.02, None, early=0.5) == pytest.approx(LONGEST * 0.05)
    assert targets.prompt_limit(0.02, None, early=0.5, spent=0.04) == pytest.approx(LONGEST * 0.05 - 0.04)


def test_what_was_learnt_can_be_saved() -> None:
    model = learnt(2e-3, 1e-4, 1e-7)
    for tokens in (64, 256, 64, 128):
        model.observe_unit("layer_a", tokens, 1e-3 + 1e-5 * tokens)
    text = msgspec.json.encode(model.state())
    other = LatencyModel()
    other.restore(msgspec.json.decode(text, type=LatencyState))
    assert other.trained and other.guard == model.guard
    assert other.predict_inference(9, 700) == pytest.approx(model.predict_inference(9, 700))
    assert other.predict_unit("layer_a", 192) == model.predict_unit("layer_a", 192)
    assert other.predict_unit("loss", 64) == 0.0
    for model_of_both in (model, other):
        model_of_both.observe_inference(9, 700, 4e-3)
    assert other.predict_inference(9, 700) == pytest.approx(model.predict_inference(9, 700))


@pytest.mark.parametrize(
    "change",
    [
        {"inference": {"count": 9, "strata": {"1": [[1.0], [1.0, 2.0]]}}},
        {"inference": {"count": 9, "strata": {"1": [[1e999]] * 7}}},
        {"units": {"else": {"count": 1, "price": 1.0, "deviation": 0.0, "fit": {"count": 0, "strata": {}}}}},
        {"errors": "none"},
        {"units": {"loss": {"count": 1, "price": "free"}}},
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, object]) -> None:
    whole = msgspec.to_builtins(learnt(2e-3, 1e-4, 1e-7).state())
    model = LatencyModel()
    with pytest.raises(ValueError):
        model.restore(msgspec.convert(whole | change, LatencyState, strict=False))
    assert not model.trained and model.predict_unit("loss", 64) == 0.0


@given(st.lists(st.floats(0.0, 0.1), max_size=30), st.floats(1e-3, 0.1))
def test_the_budget_falls_at_once_and_is_back_after_a_few_steps(before: list[float], wanted: float) -> None:
    control = BudgetControl()
    for budget in before:
        assert control.allow(budget) <= budget
    assert control.allow(0.0) == 0.0
    rise = [control.allow(wanted) for _ in range(RISE_STEPS)]
    assert rise == sorted(rise) and rise[0] < wanted and rise[-1] == pytest.approx(wanted)
    assert control.allow(wanted / 2) == wanted / 2


@given(st.floats(0.01, 0.9), st.lists(st.tuples(st.floats(1e-3, 0.1), st.floats(0.0, 1.0)), max_size=60))
def test_a_minimum_share_is_paid_whatever_training_had_before(
    share: float, before: list[tuple[float, float]]
) -> None:
    """Steps of any length, of which training had any part; then 50 ms of inference a step and no target."""
    minimum = MinimumShare(share)
    for seconds, part in before:
        minimum.account(seconds, part * seconds)
    total = trained = 0.0
    while total < 30.0:
        budget = minimum.budget(0.05)
        assert 0.0 <= budget <= 2.0 * 0.05 * share / (1.0 - share) + 1e-9
        minimum.account(0.05 + budget, budget)
        total, trained = total + 0.05 + budget, trained + budget
    assert trained >= 0.9 * share * total
    assert MinimumShare(0.0).budget(0.05) == 0.0


def test_noise_among_wide_calls_is_not_taken_for_a_floor_and_a_stall_counts_as_a_slow_call() -> None:
    cost, draw = UnitCost(), random.Random(1)
    for index in range(200):
        tokens = (256, 256, 256, 200)[index % 4]
        cost.update(1e-4 * tokens * draw.lognormvariate(0.0, 0.2), tokens)
    assert cost.predict(64) < 0.5 * cost.predict(256)
    before = cost.predict(256)
    cost.update(10.0, 256)
    assert cost.predict(256) < 1.6 * before
    for _ in range(60):
        cost.update(0.256, 256)
    assert cost.predict(256) > 0.2, "a machine that has become ten times slower is believed"
