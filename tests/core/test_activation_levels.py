"""Training takes as much activation memory as is free, and gives up levels before it loses work."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.training_sequence import TrainingSequence

from .simulation import Simulation

LEVELS = (4, 6, 8, 14, 20)  # two layers: C C, B C, B B, A B, A A


def policies(sequence: TrainingSequence) -> str:
    return "".join(sequence.policy(height) for height in (0, 1))


def test_levels_turn_layers_richer_from_the_lowest_up() -> None:
    (sequence,) = Simulation().job("job", [64], slabs=LEVELS)
    seen = []
    for sequence.level in range(5):
        seen.append((policies(sequence), sequence.slabs, sequence.unit_kind(1), sequence.unit_kind(2)))
    assert seen == [
        ("CC", 4, "layer_c", "layer_c"),
        ("BC", 6, "layer_c", "layer_b"),
        ("BB", 8, "layer_b", "layer_b"),
        ("AB", 14, "layer_b", "layer_a"),
        ("AA", 20, "layer_a", "layer_a"),
    ]
    assert sequence.unit_kind(0) == "loss"


def test_a_reservation_takes_the_highest_level_that_leaves_the_headroom() -> None:
    for blocks, expected in ((24, "AA"), (23, "AB"), (17, "BB"), (8, "CC"), (5, "CC")):
        sim = Simulation(blocks=blocks, headroom=4)
        (sequence,) = sim.job("job", [640], slabs=LEVELS)
        sim.step()
        assert sequence.extent is not None
        assert policies(sequence) == expected, blocks
        assert sim.pool.num_extent_slabs == sequence.slabs
        sim.run()
        assert sim.pool.num_free == blocks


def test_a_reservation_leaves_the_others_in_flight_their_least() -> None:
    sim = Simulation(blocks=28, headroom=4)
    first, second, third = sim.job("job", [64, 64, 64], slabs=LEVELS)
    other, _ = sim.job("other", [640, 640], slabs=LEVELS)
    sim.step()
    assert policies(first) == "BB" and first.extent is not None
    assert other.extent is not None, "room was left for it"
    sim.run()
    assert second.done and third.done and sim.pool.num_free == 28


def test_richer_levels_leave_the_prefix_cache_its_floor() -> None:
    """Idle blocks above an eighth of the pool yield to them; the lowest level takes what it needs."""
    for blocks, expected, hits in ((64, "AB", 32), (40, "BC", 32), (16, "CC", 32), (12, "CC", 16)):
        sim = Simulation(blocks=blocks, headroom=4, prefix_caching=True)
        sim.request("before", 33, 1)
        sim.run()
        assert sim.pool.num_idle == 8
        (sequence,) = sim.job("job", [640], slabs=(8, 30, 40, 50, 60))
        sim.step()
        assert sequence.extent is not None and policies(sequence) == expected, blocks
        sim.run()
        after = sim.request("after", 33, 1)
        sim.run()
        assert after.num_cached_tokens >= hits
    assert sim.pool.num_free == 12


def test_requests_take_levels_before_work_and_the_newest_goes_first() -> None:
    sim = Simulation(blocks=52, max_tokens=64, headroom=4)
    first, second = sim.job("job", [64, 640], slabs=LEVELS)
    while second.extent is None:
        sim.step()
    assert policies(first) == policies(second) == "AA"
    cursor = second.cursor
    sim.request("a", 4 * (12 + 5), 2)
    plan = None
    while plan is None or not plan.downgraded:
        plan = sim.step()
        sim.model.observe_step(1, 10, 64, 0.0, 1.0)
    assert plan.downgraded == [second] and not plan.evicted
    assert policies(second) == "AB" and second.cursor >= cursor
    sim.run()
    assert first.evictions == second.evictions == 0
    assert sim.pool.num_free == 52


def test_what_no_backward_will_read_is_taken_first() -> None:
    sim = Simulation(blocks=64)
    first, second = sim.job("job", [64, 64], slabs=LEVELS)
    queue = sim.scheduler.training
    for sequence in (first, second):
        sequence.extent, sequence.level = sim.pool.reserve_extent(20), 4
        sequence.cursor = 64
    assert first.level_in_use == 4
    first.unit_cursor = 2
    assert (first.level_in_use, second.level_in_use) == (3, 4)
    assert queue.downgrade(3) == [first] and first.level == 3
    assert queue.downgrade(3) == [second], "nothing unused is left, so the newest gives"
    assert queue.downgrade(100) == [second, first]
    assert sim.pool.num_extent_slabs == 8
    assert queue.downgrade(1) == [], "only whole microbatches are left to take"


def test_a_microbatch_evicted_twice_comes_back_at_the_lowest_level() -> None:
    sim = Simulation(blocks=400)
    (sequence,) = sim.job("job", [640], slabs=LEVELS)
    for evictions, expected in ((1, "AA"), (2, "AA"), (3, "CC")):
        sim.step()
        assert (sequence.evictions + 1, policies(sequence)) == (evictions, expected)
        assert sim.scheduler.training.evict_one() == [sequence]
    sim.run()
    assert sequence.done


def test_what_only_the_forward_needed_is_free_once_it_is_over() -> None:
    sim = Simulation(blocks=100, max_tokens=64)
    (sequence,) = sim.job("job", [128], slabs=LEVELS, head=3)
    sim.step()
    start = sequence.extent
    assert start is not None and sim.pool.num_extent_slabs == 20 and not sequence.forward_done
    while not sequence.forward_done:
        sim.step()
    assert (sequence.extent, sim.pool.num_extent_slabs) == (start + 3, 17)
    assert sim.scheduler.training.downgrade(1) == [sequence]
    assert sim.pool.num_extent_slabs == sequence.slabs == 14 - 3
    assert sim.scheduler.training.evict_one() == [sequence]
    sim.step()
    assert sim.pool.num_extent_slabs == 20, "the forward needs it again"
    sim.run()
    assert sequence.done and sim.pool.num_free == 100


def test_the_cost_of_a_unit_is_learnt_by_policy() -> None:
    sim = Simulation(blocks=400)
    sim.job("rich", [256], slabs=LEVELS)
    sim.run()
    assert sim.model.predict_unit("layer_a", 64) > 0.0 == sim.model.predict_unit("layer_c", 64)
    sim.job("rich", [256], slabs=(4, 1000, 1000, 1000, 1000))
    sim.run()
    assert sim.model.predict_unit("layer_c", 64) > 1.5 * sim.model.predict_unit("layer_a", 64)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), max_size=12),
    jobs=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=3),
    steps=st.lists(st.integers(0, 6), min_size=3, max_size=3).map(lambda s: sorted(s)),
    blocks=st.integers(32, 80),
    head=st.integers(0, 3),
)
def test_under_any_pressure_all_is_done_and_nothing_leaks(requests, jobs, steps, blocks, head) -> None:
    sim = Simulation(blocks=blocks, max_num_seqs=4, max_tokens=80)
    levels = (4, 4 + steps[0], 6 + steps[1], 9 + steps[1], 12 + steps[2])
    sequences = [s for i, sizes in enumerate(jobs) for s in sim.job(f"j{i}", sizes, slabs=levels, head=head)]
    queue = sim.scheduler.training
    evict_one = queue.evict_one

    def evict_last() -> list[TrainingSequence]:
        holding = [s for s in sequences if s.extent is not None and not s.done]
        assert all(s.level_slabs[s.level] == s.level_slabs[0] for s in holding), "levels go before work"
        return evict_one()

    queue.evict_one = evict_last
    made = []
    for index, (prompt, output) in enumerate(requests):
        made.append((sim.request(f"r{index}", prompt, output), output))
        sim.step()
        held = sum(s.slabs for s in sequences if s.extent is not None)
        assert held == sim.pool.num_extent_slabs
    sim.run()
    assert all(r.num_output_tokens == n for r, n in made)
    assert all(s.done for s in sequences)
    assert sim.pool.num_free == blocks
