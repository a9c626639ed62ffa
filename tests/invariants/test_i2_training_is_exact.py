"""I2: loss, gradients and the adapter don't depend on windows, on load, on other jobs or on pauses."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coserve.engine import messages as m
from coserve.training.job import JobSpec

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


# Jobs of every other kind that may share batches and steps with the one that is watched.
NEIGHBOURS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other batches": ({"learning_rate": 1e-3, "batch_size": 3}, {}, "supervised"),
    "high rank": ({"optimizer": "adamw_8bit"}, {"r": 8, "lora_alpha": 4.0}, "supervised"),
    "few targets": (
        {"optimizer": "sgd", "priority": -1},
        {"r": 2, "target_modules": ("up_proj",)},
        "supervised",
    ),
    "dropout": ({"batch_size": 12}, {"lora_dropout": 0.5, "freeze_a": True}, "supervised"),
    "odd windows": ({"window_tokens": 7, "label_smoothing": 0.1}, {}, "supervised"),
    "dft": ({"packing": True, "max_length": 128, "batch_size": 1}, {}, "dft"),
    "diverging": ({"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}, {}, "supervised"),
}


def neighbour(kind: str, data, folder) -> JobSpec:
    training, lora, method = NEIGHBOURS[kind]
    spec = world.make_job(data, folder, f"ftjob-{kind.replace(' ', '-')}", **training)
    return replace(spec, lora=replace(spec.lora, **lora), method=method)


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 150), st.integers(1, 30)), max_size=10),
    pause_at=st.one_of(st.none(), st.integers(1, 30)),
    beside=st.lists(st.sampled_from(sorted(NEIGHBOURS)), max_size=3, unique=True),
    window=st.sampled_from([0, 64, 128]),
    interrupted=st.sampled_from([0.0, 0.3, 1.0]),
    slabs=st.sampled_from([300, 450, 1000]),
)
def test_load_pauses_and_neighbours_change_no_bit(
    model, data, adapters, tmp_path_factory, quiet, arrivals, pause_at, beside, window, interrupted, slabs
) -> None:
    folder = tmp_path_factory.mktemp("busy")
    slab = 2 * 2 * 16 * 2 * 8 * 4
    local = world.make_engine(model, max_model_len=256, kv_cache_memory_bytes=slabs * slab)
    chance = random.Random(len(arrivals))
    local.engine.arrivals = lambda: chance.random() < interrupted
    spec = world.make_job(data, folder, window_tokens=window)
    world.submit(local, spec)
    others = [neighbour(kind, data, folder) for kind in beside]
    for other in others:
        world.submit(local, other)
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
    local.engine.arrivals = lambda: False
    good = [other.job_id for other in others if other.training.learning_rate < 1.0]
    world.finish(local, spec.job_id, *good)
    if "diverging" in beside:
        local.run_until(lambda: world.status_of(local, "ftjob-diverging") == "failed", 5000)
    local.run_until(lambda: not local.engine.scheduler.has_requests, 5000)
    assert world.same_bits(world.final_adapter(spec), quiet[0])
    assert world.progress(local, spec.job_id) == quiet[1]
    assert world.pool_is_empty(local)


def test_the_loss_falls(quiet) -> None:
    losses = [loss for _, loss, _ in quiet[1]]
    assert losses[-1] < losses[0]
