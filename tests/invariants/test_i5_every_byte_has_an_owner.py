"""I5: one pool; after drain it is empty; inference takes memory from training, never the other way."""

from __future__ import annotations

import itertools

from coserve.core.step_plan import StepPlan
from coserve.engine import messages as m

from . import world


def test_after_drain_the_pool_is_empty(model, data, adapters, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    for index in range(6):
        local.add(str(index), [3 + index] * 40, world.GREEDY, adapters[index % 3])
    world.finish(local, spec.job_id)
    local.run_until(lambda: len(local.finished) == 6, 2000)
    engine = local.engine
    assert world.pool_is_empty(local)
    assert engine.jobs.optimizer_bytes == engine.jobs.workspace_bytes == 0
    assert world.rows_are_idle(local), "the job's wait for its version, and go when others want them"
    memory = engine.stats.snapshot(1).memory_bytes
    assert memory["activations"] == 0
    # What is left belongs to the prefix cache, which gives it up to whoever asks.
    assert memory["kv"] == engine.blocks.num_idle * engine.kv.slab_bytes
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_abort_frees_at_once(model, adapters) -> None:
    local = world.make_engine(model, enable_prefix_caching=False)
    for index in range(5):
        local.add(str(index), [9] * 50, world.GREEDY, adapters[index % 3])
    local.engine.step()
    local.engine.step()
    local.engine.handle(m.AbortRequests(request_ids=[str(index) for index in range(5)]))
    assert world.pool_is_empty(local)
    assert all(local.finished[str(index)].finish_reason == "abort" for index in range(5))


def test_requests_take_memory_from_training_and_training_recovers(model, data, tmp_path) -> None:
    quiet = world.make_engine(model)
    spec = world.make_job(data, tmp_path / "quiet", n_epochs=1, window_tokens=7)
    world.submit(quiet, spec)
    world.finish(quiet, spec.job_id)
    slab = quiet.engine.kv.slab_bytes
    tight = world.make_engine(model, max_model_len=512, kv_cache_memory_bytes=350 * slab)
    again = world.make_job(data, tmp_path / "tight", n_epochs=1, window_tokens=7)
    world.submit(tight, again)
    tight.run_until(lambda: tight.engine.blocks.num_extent_slabs > 0, 100)
    sampling = world.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    for index in range(24):
        tight.add(str(index), [index + 3] * 300, sampling)
    sequences = tight.engine.scheduler.training.sequences
    tight.run_until(lambda: len(tight.finished) == 24, 20_000)
    assert max(s.evictions for s in sequences) > 0
    assert tight.engine.scheduler.training.num_downgrades > 0, "levels go before work"
    world.finish(tight, again.job_id)
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert world.pool_is_empty(tight)


def test_requests_take_levels_of_activations_and_no_work_is_lost(model, data, tmp_path) -> None:
    quiet = world.make_engine(model)
    spec = world.make_job(data, tmp_path / "quiet", n_epochs=1, window_tokens=7)
    world.submit(quiet, spec)
    quiet.engine.step()
    (before,) = quiet.engine.stats.snapshot(1).activation_policies.values()
    assert before["A"] > 0 == before["B"] == before["C"], "all is kept while memory lasts"
    world.finish(quiet, spec.job_id)
    slab = quiet.engine.kv.slab_bytes
    tight = world.make_engine(model, max_model_len=512, kv_cache_memory_bytes=256 * slab)
    again = world.make_job(data, tmp_path / "tight", n_epochs=1, window_tokens=7)
    world.submit(tight, again)
    queue, blocks = tight.engine.scheduler.training, tight.engine.blocks
    mixed: list[dict[str, int]] = []
    asked = 0

    def step_under_pressure() -> bool:
        """Ten requests of 13 blocks once training holds so much that it must give some up; they leave two
        microbatches of 56 slabs at the least what they need."""
        nonlocal asked
        if blocks.num_extent_slabs > 130 and len(tight.finished) == asked:
            for _ in range(10):
                tight.add(str(asked), [3 + asked % 90] * 16 * 12, world.GREEDY)
                asked += 1
        mixed.extend(tight.engine.stats.snapshot(1).activation_policies.values())
        return world.status_of(tight, again.job_id) in ("succeeded", "failed")

    tight.run_until(step_under_pressure, 20_000)
    tight.run_until(lambda: len(tight.finished) == asked, 2000)
    assert queue.num_downgrades > 0 and queue.num_evictions == 0
    assert {letter for layers in mixed for letter, n in layers.items() if n} >= {"A", "B"}
    for index in range(0, asked, 7):
        alone = quiet.generate([3 + index % 90] * 16 * 12, world.GREEDY)
        assert tight.tokens[str(index)] == alone, "training left the slabs it gave up alone"
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert world.pool_is_empty(tight)


def test_a_job_that_fits_only_at_the_least_trains_to_the_same_bits(model, data, tmp_path) -> None:
    ample = world.make_engine(model)
    spec = world.make_job(data, tmp_path / "ample", n_epochs=1)
    world.submit(ample, spec)
    needed: list[int] = []

    def ended() -> bool:
        needed.extend(s.level_slabs[0] for s in ample.engine.scheduler.training.sequences)
        return world.status_of(ample, spec.job_id) == "succeeded"

    ample.run_until(ended, 20_000)
    pool = max(needed) * ample.engine.kv.slab_bytes
    short = world.make_engine(model, max_model_len=128, kv_cache_memory_bytes=pool - 1)
    refused = world.make_job(data, tmp_path / "short", n_epochs=1)
    world.submit(short, refused)
    short.run_until(lambda: world.status_of(short, refused.job_id) == "failed", 20_000)
    assert any(f"need {pool} bytes" in s.message for s in short.take(m.JobStatus))
    small = world.make_engine(model, max_model_len=128, kv_cache_memory_bytes=pool)
    again = world.make_job(data, tmp_path / "small", n_epochs=1)
    world.submit(small, again)
    world.finish(small, again.job_id)
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert world.pool_is_empty(small)


def test_keys_that_no_backward_reads_go_with_the_forward(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path, n_epochs=1, window_tokens=7)
    top = m.msgspec.structs.replace(spec.lora, layers_to_transform=(1,))
    world.submit(local, m.msgspec.structs.replace(spec, lora=top))
    held: dict[bool, int] = {}

    def ended() -> bool:
        for sequence in local.engine.scheduler.training.sequences[:1]:
            if sequence.extent is not None and not sequence.done:
                assert sequence.head_slabs > 0
                held.setdefault(sequence.forward_done, sequence.slabs)
                assert sequence.has_head is not sequence.forward_done
        return world.status_of(local, spec.job_id) == "succeeded"

    local.run_until(ended, 20_000)
    assert held[True] < held[False]
    assert world.pool_is_empty(local)


def test_a_cancelled_job_leaves_nothing(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    for _ in range(3):
        local.engine.step()
    reply = local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="cancel"))
    assert reply.error is None and world.status_of(local, spec.job_id) == "cancelled"
    assert world.pool_is_empty(local) and len(local.engine.slots) == 0


def test_gradients_kept_after_a_microbatch_are_the_same_bits(model, tmp_path) -> None:
    """A backward that loses its memory for the second time takes no finished microbatch with it."""
    data = world.make_data(tmp_path / "long", examples=48)
    quiet = world.make_engine(model)
    spec = world.make_job(data, tmp_path / "quiet", n_epochs=2, batch_size=48)
    world.submit(quiet, spec)
    world.finish(quiet, spec.job_id)
    local = world.make_engine(model)
    again = world.make_job(data, tmp_path / "again", n_epochs=2, batch_size=48)
    world.submit(local, again)
    engine = local.engine
    engine.arrivals = itertools.cycle((False, True)).__next__  # a call or two a step
    queue, at = engine.scheduler.training, [(0, 3), (1, 5), (2, 2), (1, 9)]
    masters = engine.jobs.optimizer_bytes
    lost: list[int] = []

    def ended() -> bool:
        going = next((s for s in queue.sequences if s.holds_gradients and not s.done), None)
        if at and going is not None and going.index == at[0][0] and going.unit_cursor >= at[0][1]:
            at.pop(0)
            while going.extent is not None:
                evicted = queue.evict_one()
                engine.jobs.prepare(StepPlan(evicted=evicted))
            lost.append(len(evicted))
            assert engine.blocks.num_extent_slabs == 0
        return world.status_of(local, again.job_id) in ("succeeded", "failed")

    local.run_until(ended, 20_000)
    assert not at and lost == [3, 2, 1, 2], "the last of them is of the next optimizer step"
    assert engine.jobs.optimizer_bytes == 0 < masters
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert world.pool_is_empty(local)


def test_after_pauses_cancels_aborts_and_preemptions_nothing_leaks(model, data, adapters, tmp_path) -> None:
    """Whatever ends in the middle: when all have left, every slab and every row of an adapter is free."""
    slab = world.make_engine(model).engine.kv.slab_bytes
    local = world.make_engine(model, max_model_len=512, kv_cache_memory_bytes=200 * slab, max_loras=3)
    engine, jobs = local.engine, [world.make_job(data, tmp_path, f"ftjob-{n}") for n in range(3)]
    rows = engine.slots.rows_in_use

    def control(number: int, action: str) -> None:
        reply = local.call(lambda i: m.ControlJob(call_id=i, job_id=jobs[number].job_id, action=action))
        assert reply.error is None, reply.error

    for job in jobs:
        world.submit(local, job)
    long = world.SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    for number in range(24):
        local.add(f"r{number}", [3 + number] * 60, long, adapters[number % 3] if number % 2 else None)
        engine.step()
    local.run_until(lambda: engine.scheduler.num_preemptions > 0, 2000)
    control(0, "pause")
    control(1, "cancel")
    engine.handle(m.AbortRequests(request_ids=[f"r{number}" for number in range(0, 24, 3)]))
    local.run_until(lambda: len(local.finished) == 24, 5000)
    assert not any(s.job_id != jobs[2].job_id for s in engine.scheduler.training.sequences)
    control(0, "resume")
    local.run_until(lambda: len(world.progress(local, jobs[0].job_id)) > 0, 5000)
    control(0, "cancel")
    world.finish(local, jobs[2].job_id)
    for adapter in adapters:
        local.call(lambda i, ref=adapter: m.UnloadAdapter(call_id=i, digest=ref.digest))
    assert world.pool_is_empty(local) and engine.blocks.num_extent_slabs == 0
    assert engine.slots.keys == [jobs[2].job_id], "it waits for its version, for anybody to take its rows"
    assert engine.slots.unload(jobs[2].job_id) and engine.slots.rows_in_use == rows == 0
    owners = engine.stats.snapshot(0).memory_bytes
    assert owners["adapters"] == owners["activations"] == owners["optimizer"] == 0
    assert owners["kv"] == engine.blocks.num_idle * slab, "what is left is the prefix cache's"
    assert owners["free"] + owners["kv"] == engine.kv.nbytes
    free = engine.blocks.allocate(engine.blocks.num_blocks)
    assert free is not None and len(set(free)) == engine.blocks.num_blocks, "every slab can be had"
