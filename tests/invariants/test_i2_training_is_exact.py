"""I2: loss, gradients and the adapter don't depend on windows, on load, on other jobs or on pauses."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coserve.engine import messages as m

from . import world


@pytest.fixture(scope="module")
def quiet(model, data, tmp_path_factory):
    """The job run with the device to itself: its final adapter and its log."""
    folder = tmp_path_factory.mktemp("quiet")
    local = world.make_engine(model)
    spec = world.make_job(data, folder)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    return world.final_adapter(spec), world.progress(local, spec.job_id)


@pytest.mark.parametrize("window", [64, 128])
def test_windows_at_tile_edges_change_no_bit(model, data, tmp_path, quiet, window) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path, window_tokens=window)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    assert world.same_bits(world.final_adapter(spec), quiet[0])
    assert world.progress(local, spec.job_id) == quiet[1]


def test_odd_windows_agree_within_tolerance(model, data, tmp_path, quiet) -> None:
    local = world.make_engine(model)
    spec = world.make_job(data, tmp_path, window_tokens=7)
    world.submit(local, spec)
    world.finish(local, spec.job_id)
    for name, tensor in world.final_adapter(spec).items():
        assert (tensor - quiet[0][name]).abs().max() <= 1e-4 * quiet[0][name].abs().max()


@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 150), st.integers(1, 30)), max_size=10),
    pause_at=st.one_of(st.none(), st.integers(1, 30)),
    neighbour=st.booleans(),
    slabs=st.sampled_from([300, 450, 1000]),
)
def test_load_pauses_and_neighbours_change_no_bit(
    model, data, adapters, tmp_path_factory, quiet, arrivals, pause_at, neighbour, slabs
) -> None:
    folder = tmp_path_factory.mktemp("busy")
    slab = 2 * 2 * 16 * 2 * 8 * 4
    local = world.make_engine(model, max_model_len=256, kv_cache_memory_bytes=slabs * slab)
    spec = world.make_job(data, folder)
    world.submit(local, spec)
    if neighbour:
        world.submit(local, world.make_job(data, folder, "ftjob-2", learning_rate=1e-3, batch_size=3))
    calls = count(1)
    # Now and then a message seems to wait, so that forward windows rest between two layers.
    local.engine.arrivals = lambda: next(calls) % 3 == 0
    for step in range(42):
        for index, (at, prompt, output) in enumerate(arrivals):
            if at == step:
                sampling = world.SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
                ids = [(7 * i + index) % 90 + 2 for i in range(prompt)]
                local.add(f"r{index}", ids, sampling, adapters[index % 3] if index % 2 else None)
        if pause_at == step and world.status_of(local, spec.job_id) == "running":
            local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="pause"))
            local.engine.step()
            local.call(lambda i: m.ControlJob(call_id=i, job_id=spec.job_id, action="resume"))
        local.engine.step()
    world.finish(local, spec.job_id, *(["ftjob-2"] if neighbour else []))
    local.run_until(lambda: not local.engine.scheduler.has_requests, 5000)
    assert world.same_bits(world.final_adapter(spec), quiet[0])
    assert world.progress(local, spec.job_id) == quiet[1]
    assert world.pool_is_empty(local)


def test_the_loss_falls(quiet) -> None:
    losses = [loss for _, loss, _ in quiet[1]]
    assert losses[-1] < losses[0]
