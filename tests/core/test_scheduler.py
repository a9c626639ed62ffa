"""The scheduler's promises, on a device made of arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core.request import RequestStatus
from coserve.core.slo import LONGEST, UNIT_SECONDS
from coserve.core.span import SpanKind

from .simulation import Simulation


def test_a_prompt_is_prefilled_in_chunks_then_decoded_a_token_a_step() -> None:
    sim = Simulation(max_tokens=8)
    request = sim.request("a", 20, 3)
    lengths = [sim.step().inference[0].length for _ in range(5)]
    assert lengths == [8, 8, 4, 1, 1]
    assert request.finished and request.num_output_tokens == 3
    assert sim.pool.num_free == sim.pool.num_blocks


def test_decodes_and_a_new_prompt_share_a_step() -> None:
    sim = Simulation()
    sim.request("a", 4, 8)
    sim.step()
    sim.request("b", 6, 2)
    kinds = {span.request.sequence_id: span.kind for span in sim.step().inference}
    assert kinds == {"a": SpanKind.DECODE, "b": SpanKind.PREFILL}


def test_lower_priority_number_goes_first() -> None:
    sim = Simulation(max_num_seqs=1)
    sim.request("late", 4, 1, priority=5)
    sim.request("first", 4, 1, priority=-1)
    assert sim.step().inference[0].request.sequence_id == "first"


def test_a_full_pool_preempts_the_last_in_order_and_it_recovers() -> None:
    sim = Simulation(blocks=6, block_size=4)
    first, second = sim.request("a", 8, 12), sim.request("b", 8, 12)
    preempted: list[str] = []
    while sim.scheduler.has_requests:
        preempted += [r.sequence_id for r in sim.step().preempted]
    assert preempted and set(preempted) == {"b"}
    assert first.num_output_tokens == second.num_output_tokens == 12
    assert first.num_preemptions == 0 and second.num_preemptions >= 1
    assert sim.pool.num_free == 6


def test_abort_frees_at_once() -> None:
    sim = Simulation()
    running, waiting = sim.request("a", 30, 5), sim.request("b", 5, 5)
    sim.scheduler.limits = sim.scheduler.limits.__class__(1, 64, 4, 4)
    sim.step()
    assert sim.pool.num_kv_blocks > 0
    sim.scheduler.finish(running)
    sim.scheduler.finish(waiting)
    assert sim.pool.num_kv_blocks == 0 and not sim.scheduler.has_requests
    assert running.status is RequestStatus.FINISHED


def test_an_adapter_being_loaded_delays_only_its_own_requests() -> None:
    sim = Simulation()
    slow = sim.request("slow", 4, 2, adapter="sha256:x")
    fast = sim.request("fast", 4, 2)
    sim.step()
    assert sim.scheduler.num_deferred == 1
    assert slow.num_output_tokens == 0 and fast.num_output_tokens == 1
    sim.slots.allocate("sha256:x", 8)
    sim.run()
    assert slow.num_output_tokens == 2
    assert sim.slots.unload("sha256:x"), "its last reader has gone"


def test_a_cached_prefix_is_not_computed_again_and_never_crosses_adapters() -> None:
    sim = Simulation(prefix_caching=True)
    for key in ("sha256:x", "sha256:y"):
        sim.slots.allocate(key, 8)
    sim.request("a", 17, 1, adapter="sha256:x")
    sim.run()
    same, other = sim.request("b", 17, 1, adapter="sha256:x"), sim.request("c", 17, 1, adapter="sha256:y")
    base = sim.request("d", 17, 1)
    sim.run()
    assert (same.num_cached_tokens, other.num_cached_tokens, base.num_cached_tokens) == (16, 0, 0)


def test_a_cached_prefix_is_only_for_those_who_know_its_salt() -> None:
    sim = Simulation(prefix_caching=True)
    sim.request("a", 17, 1, cache_salt="secret")
    sim.run()
    same, other = sim.request("b", 17, 1, cache_salt="secret"), sim.request("c", 17, 1, cache_salt="guess")
    open_to_all = sim.request("d", 17, 1)
    sim.run()
    assert [r.num_cached_tokens for r in (same, other, open_to_all)] == [16, 0, 0]


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    sim = Simulation(prefix_caching=True)
    sim.request("a", 16, 1)
    sim.run()
    again = sim.request("b", 16, 1)
    sim.run()
    assert again.num_cached_tokens == 12 and again.num_output_tokens == 1


def test_training_takes_the_device_when_nobody_waits() -> None:
    sim = Simulation()
    sequences = sim.job("job", [256, 128], slabs=8)
    sim.run()
    assert all(s.done for s in sequences)
    assert sim.pool.num_extent_slabs == 0


def test_forward_of_one_microbatch_shares_steps_with_backward_of_another() -> None:
    sim = Simulation(max_tokens=64)
    sim.job("job", [256, 256, 256], slabs=8)
    sim.run()
    both = [p for p in sim.plans if p.training_forward and p.training_backward]
    assert both
    for plan in both:
        forward = {s.sequence.index for s in plan.training_forward}
        backward = {s.sequence.index for s in plan.training_backward}
        assert not forward & backward


def test_backward_goes_in_index_order() -> None:
    sim = Simulation()
    sim.job("job", [64, 192, 64])
    sim.run()
    order = [s.sequence.index for p in sim.plans for s in p.training_backward]
    assert order == sorted(order)


def test_windows_are_cut_at_tiles() -> None:
    sim = Simulation(max_tokens=200)
    sim.job("job", [500])
    sim.run()
    starts = [s.start for p in sim.plans for s in p.training_forward]
    assert all(start % 64 == 0 for start in starts)
    assert sum(s.length for p in sim.plans for s in p.training_forward) == 500


def test_without_requests_windows_are_long_and_apart() -> None:
    sim = Simulation(max_tokens=1000)
    sim.job("job", [700])
    plan = sim.scheduler.schedule(0.0)
    assert [s.length for s in plan.training_forward] == [256] and plan.apart, "nothing is known yet"
    sim.model.observe_unit("apart", 100, UNIT_SECONDS / 4)
    plan = sim.scheduler.schedule(0.0)
    assert [s.length for s in plan.training_forward] == [256] and plan.apart
    for _ in range(8):
        sim.model.observe_unit("apart", 100, UNIT_SECONDS * 2.0)
    plan = sim.scheduler.schedule(0.0)
    assert [s.length for s in plan.training_forward] == [64], "a layer of it would keep an arrival waiting"


def test_a_window_that_rests_goes_on_before_anything_else() -> None:
    sim = Simulation(max_tokens=1000, tpot=50e-3, blocks=400)
    first, second = sim.job("a", [300], slabs=20) + sim.job("b", [300], slabs=20)
    queue = sim.scheduler.training
    plan = sim.scheduler.schedule(0.0)
    queue.rest(plan.training_forward, 0.1, layer_seconds=10e-3)
    queue.charge("a", 5.0)
    assert sim.scheduler.schedule(0.0).training_forward == plan.training_forward
    for _ in range(20):
        sim.model.observe_inference(8, 8, 5e-3)
    sim.request("r", 8, 20)
    beside = sim.scheduler.schedule(0.0)
    assert beside.inference and beside.apart and beside.training_forward == plan.training_forward
    assert not beside.training_backward
    assert queue.awake() == 0.1 and not queue.resting
    queue.rest(plan.training_forward, 0.1, layer_seconds=10e-3)
    moved = plan.training_forward[0].sequence
    assert moved in (first, second)
    moved.cursor += 64
    assert not queue.resting and queue.awake() == 0.0


def test_a_layer_of_a_resting_window_is_saved_up_for() -> None:
    sim = Simulation(max_tokens=1000, tpot=20e-3, blocks=400)
    sim.job("a", [300], slabs=20)
    for _ in range(20):
        sim.model.observe_inference(1, 8, 5e-3)
    plan = sim.scheduler.schedule(0.0)
    sim.request("r", 1, 50)
    sim.scheduler.training.rest(plan.training_forward, 0.1, layer_seconds=40e-3)
    beside = [sim.scheduler.schedule(0.0) for _ in range(8)]
    paid = [p for p in beside if p.training_forward]
    assert 0 < len(paid) < len(beside) and all(p.apart for p in paid)


def test_a_job_may_set_its_window() -> None:
    sim = Simulation()
    sim.job("job", [50], window=7)
    sim.run()
    lengths = [s.length for p in sim.plans for s in p.training_forward]
    assert lengths == [7] * 7 + [1]


def test_training_keeps_to_what_the_target_leaves() -> None:
    sim = Simulation(tpot=20e-3, blocks=400)
    for i in range(4):
        sim.request(f"r{i}", 8, 300)
    for _ in range(20):
        sim.step()
    sim.job("job", [512] * 60, slabs=20)
    answers = []
    for _ in range(200):
        sim.step()
        answers.append(sim.answered)
    gaps = [b - a for a, b in pairwise(answers[40:])]
    assert sum(gap > LONGEST * 20e-3 for gap in gaps) <= 3, "only while costs are being learnt"
    assert sum(gaps) / len(gaps) <= 20e-3
    trained = sum(s.length for p in sim.plans[60:] for s in p.training_backward)
    assert trained > 0


def test_requests_take_memory_back_from_training() -> None:
    sim = Simulation(blocks=40, max_tokens=64)
    sequences = sim.job("job", [640], slabs=20)
    sim.step()
    assert sequences[0].extent is not None
    requests = [sim.request(f"r{i}", 40, 30) for i in range(4)]
    evicted = 0
    while sim.scheduler.has_requests:
        plan = sim.step()
        evicted += len(plan.evicted)
        assert not plan.preempted or sim.pool.num_extent_slabs == 0
    assert evicted >= 1
    assert all(r.num_output_tokens == 30 for r in requests)
    sim.run()
    assert sequences[0].done


def test_a_microbatch_is_scored_by_the_reference_before_it_trains() -> None:
    sim = Simulation(max_tokens=64)
    sequences = sim.job("job", [130, 64, 200], reference=True)
    adapters: dict[int, list[str | None]] = {}
    units: list[tuple[bool, int]] = []
    seen = 0
    while not all(s.done for s in sequences):
        before, trains = {s.index: s.adapter for s in sequences}, {s.index: s.trains for s in sequences}
        plan = sim.step()
        units += [(trains[s.sequence.index], s.sequence.index) for s in plan.training_backward]
        for span in plan.training_forward:
            adapters.setdefault(span.sequence.index, []).append(before[span.sequence.index])
            seen += span.length
    assert seen == 2 * (130 + 64 + 200)
    assert [sorted(set(a), key=a.index) for _, a in sorted(adapters.items())] == [[None, "job"]] * 3
    backward = [index for training, index in units if training]
    assert backward == sorted(backward) and set(backward) == {0, 1, 2}, "gradients in index order"
    assert units.index((False, 1)) < len(units) - units[::-1].index((True, 0)), "scores are taken ahead"
    assert sim.pool.num_extent_slabs == 0


def test_a_pass_whose_memory_is_taken_starts_over_and_earlier_scores_stay() -> None:
    sim = Simulation(blocks=40, max_tokens=64)
    (sequence,) = sim.job("job", [640], slabs=20, reference=True)
    while sequence.pass_index == 0:
        sim.step()
    sim.step()
    assert sequence.adapter == "job" and sequence.cursor > 0
    while sequence.extent is not None:
        assert sim.scheduler.training.evict_one() == [sequence]
    assert (sequence.pass_index, sequence.cursor, sequence.adapter) == (1, 0, "job")
    sim.run()
    assert sequence.done


def test_jobs_share_the_device_fairly() -> None:
    sim = Simulation(blocks=400)
    a, b = sim.job("a", [64] * 40, slabs=2), sim.job("b", [256] * 10, slabs=4)
    while not (all(s.done for s in a) or all(s.done for s in b)):
        sim.step()
    done = [sum(s.cursor for s in seqs) for seqs in (a, b)]
    assert 0.6 < done[0] / done[1] < 1.6


def test_a_job_with_priority_goes_faster() -> None:
    sim = Simulation(blocks=400)
    fast, slow = sim.job("a", [64] * 40, slabs=2, priority=-1), sim.job("b", [64] * 40, slabs=2)
    while not all(s.done for s in fast):
        sim.step()
    assert sum(s.cursor for s in slow) < 0.75 * sum(s.cursor for s in fast)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(-1, 1)), max_size=12),
    jobs=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), max_size=3),
    blocks=st.integers(32, 80),
    caching=st.booleans(),
)
def test_everyone_is_served_and_the_pool_is_empty_after(requests, jobs, blocks, caching) -> None:
    sim = Simulation(blocks=blocks, prefix_caching=caching, max_num_seqs=4, max_tokens=80)
    sequences = [s for i, sizes in enumerate(jobs) for s in sim.job(f"j{i}", sizes, slabs=6)]
    made = []
    for i, (prompt, output, priority) in enumerate(requests):
        made.append((sim.request(f"r{i}", prompt, output, priority=priority), output))
        if i % 3 == 0:
            sim.step()
    sim.run()
    assert all(r.num_output_tokens == n for r, n in made)
    assert all(s.done for s in sequences)
    assert sim.pool.num_free == blocks


def test_a_prompt_beside_decoding_requests_comes_in_parts_that_they_can_wait_for() -> None:
    sim = Simulation(blocks=400, max_tokens=512)
    sim.request("reader", 8, 300)
    for size in (8, 40, 90):
        sim.request(f"earlier {size}", size, 2)
    for _ in range(60):
        sim.step()
    prompt = sim.request("long", 400, 4)
    before = len(sim.plans)
    while prompt.num_output_tokens == 0:
        sim.step()
    parts = [s.length for plan in sim.plans[before:] for s in plan.inference if s.request is prompt]
    assert sum(parts) == 400 and len(parts) > 2
    assert max(sim.durations[before:-1]) < 0.02  # the automatic target's floor is 12 ms
    assert all(any(s.request.sequence_id == "reader" for s in p.inference) for p in sim.plans[before:])


def test_a_prompt_that_nobody_decodes_beside_comes_whole() -> None:
    sim = Simulation(blocks=400, max_tokens=512)
    for size in (8, 40, 256):
        sim.request(f"earlier {size}", size, 4)
        sim.run()
    sim.request("long", 400, 4)
    assert [span.length for span in sim.step().inference] == [400]


def test_a_burst_takes_training_off_the_device_in_the_next_step_and_it_comes_back_step_by_step() -> None:
    sim = Simulation(blocks=2000, max_num_seqs=2, max_tokens=512, tpot=20e-3)
    for index, size in enumerate((8, 20, 40, 90)):
        sim.request(f"warm-{index}", size, 12)
    sim.run()
    sim.job("job", [9000], slabs=4)
    sim.request("reader", 8, 400)
    budgets = []
    for _ in range(40):
        plan = sim.step()
        budgets.append(plan.training_budget)
    assert max(budgets) > 5e-3
    burst, came = [sim.request(f"burst-{index}", 8, 12) for index in range(4)], len(sim.plans)
    assert sim.step().training_budget == 0.0 and sim.durations[-1] < 10e-3
    while sim.scheduler.waiting:
        assert sim.step().training_budget == 0.0 or not sim.scheduler.waiting
    while not all(request.finished for request in burst):
        sim.step()
    for _ in range(10):
        sim.step()
    back = [plan.training_budget for plan in sim.plans[came:] if plan.training_budget > 0.0]
    assert back[0] < 0.8 * max(back)
    assert max(back) == pytest.approx(max(budgets), rel=0.1)


def test_a_prompt_beside_readers_who_waited_for_training_is_shorter_and_then_training_waits_for_it() -> None:
    sim = Simulation(blocks=2000, max_tokens=512, tpot=30e-3)
    for index, size in enumerate((8, 20, 40, 90)):
        sim.request(f"warm-{index}", size, 12)
    sim.run()
    sim.job("job", [4000], slabs=4)
    reader, gaps, answered = sim.request("reader", 8, 60), [], 0.0
    while not reader.finished:
        if reader.num_output_tokens == 30 and not any(r.sequence_id == "late" for r in sim.scheduler.running):
            late = sim.request("late", 700, 2)
        sim.step()
        gaps.append(sim.answered - answered)
        answered = sim.answered
    parts = [p for p in sim.plans if any(s.request is late and not s.samples for s in p.inference)]
    assert len(parts) > 1 and parts[0].inference_tokens < parts[1].inference_tokens
    assert all(plan.training_budget == 0.0 for plan in parts[:1])
    assert max(gaps[2:]) <= LONGEST * 30e-3 and sim.training_seconds > 0.0
