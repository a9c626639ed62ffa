"""I5: one pool; after drain it is empty; inference takes memory from training, never the other way."""

from __future__ import annotations

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
    assert spec.job_id not in engine.slots
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
    world.finish(tight, again.job_id)
    assert world.same_bits(world.final_adapter(again), world.final_adapter(spec))
    assert world.pool_is_empty(tight)


def test_a_cancelled_job_leaves_nothing(model, data, tmp_path) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path)
    world.submit(local, spec)
    for _ in range(3):
        local.engine.step()
    reply = local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="cancel"))
    assert reply.error is None and world.status_of(local, spec.job_id) == "cancelled"
    assert world.pool_is_empty(local) and len(local.engine.slots) == 0
