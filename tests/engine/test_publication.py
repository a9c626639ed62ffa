"""A job's adapter becomes a version where it lies: its rows are taken over, its files aren't read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from tests.invariants import world

PROMPT = list(range(3, 60))


@pytest.fixture
def trained(model: Path, data: Path, tmp_path: Path) -> Callable[..., tuple[LocalEngine, m.AdapterRef]]:
    """Makes an engine whose job has just succeeded, and the version it ends with."""

    def make(**training: object) -> tuple[LocalEngine, m.AdapterRef]:
        local, spec = world.make_engine(model), world.make_job(data, tmp_path, **training)
        world.submit(local, spec)
        world.finish(local, spec.job_id)
        return local, world.ref(Path(local.take(m.JobStatus)[-1].result_path), model)

    return make


def publish(local: LocalEngine, version: m.AdapterRef, job_id: str = "ftjob-1") -> None:
    reply = local.call(lambda i: m.LoadAdapter(call_id=i, adapter=version, job_id=job_id), 2000)
    assert reply.error is None


def weights(local: LocalEngine, digest: str) -> list[torch.Tensor]:
    """An adapter's rows, and its ranks."""
    pool, rows = local.engine.pool, local.engine.slots.rows(digest)
    return [tensor[:, rows] for tensor in (*pool._a, *pool._b)] + [pool.ranks(rows)]


def test_a_version_takes_its_job_s_rows_over(model, trained) -> None:
    local, version = trained()
    rows = local.engine.slots.rows("ftjob-1")
    publish(local, version)
    assert local.engine.slots.keys == [version.digest] and local.engine.slots.rows(version.digest) == rows
    assert local.engine.adapters.swaps == {"publish": 1}, "nothing was loaded"
    assert local.engine.adapters.tiers() == {version.digest: "device"}
    fresh = world.make_engine(model)
    assert local.generate(PROMPT, world.GREEDY, version) == fresh.generate(PROMPT, world.GREEDY, version)
    pairs = zip(weights(local, version.digest), weights(fresh, version.digest), strict=True)
    assert all(torch.equal(mine, loaded) for mine, loaded in pairs)


def test_once_its_rows_have_gone_it_is_loaded_from_its_files(model, trained) -> None:
    local, version = trained()
    local.engine.slots.unload("ftjob-1")
    publish(local, version)
    assert local.engine.adapters.swaps["load"] == 1 and local.engine.adapters.swaps["publish"] == 0
    expected = world.make_engine(model).generate(PROMPT, world.GREEDY, version)
    assert local.generate(PROMPT, world.GREEDY, version) == expected


def test_a_taken_over_version_comes_back_after_it_was_evicted(trained) -> None:
    local, version = trained()
    publish(local, version)
    first = local.generate(PROMPT, world.GREEDY, version)
    local.engine.slots.unload(version.digest)
    assert local.generate(PROMPT, world.GREEDY, version) == first


def test_a_job_that_ends_with_an_earlier_step_leaves_no_rows(trained, data) -> None:
    local, version = trained(validation=data, early_stopping_patience=3, learning_rate=0.5, eval_steps=1)
    assert not version.path.endswith("step-000006"), "an earlier step was better"
    assert local.engine.slots.keys == []
    publish(local, version)
    assert local.engine.adapters.swaps == {"load": 1, "evict": 0}


def test_rows_of_a_job_that_still_runs_are_never_taken(model, data, trained, tmp_path) -> None:
    local, version = trained()
    again = world.make_job(data, tmp_path / "again", "ftjob-2")
    world.submit(local, again)
    publish(local, version, "ftjob-2")
    assert "ftjob-2" in local.engine.slots and version.digest in local.engine.slots
    world.finish(local, "ftjob-2")
    assert world.progress(local, "ftjob-2")[-1][0] == 6


def test_rows_that_a_live_reader_keeps_are_not_taken_over(model, data, tmp_path) -> None:
    local, spec = world.make_engine(model), world.make_job(data, tmp_path, validation=data)
    world.submit(local, spec)
    local.run_until(lambda: local.engine.jobs._jobs[spec.job_id].step == 6)  # its scores are still due
    long = replace(world.GREEDY, max_tokens=400)
    local.add("late", PROMPT, long, live_job=spec.job_id)
    world.finish(local, spec.job_id)
    assert spec.job_id not in local.engine.slots
    version = world.ref(Path(local.take(m.JobStatus)[-1].result_path), model)
    publish(local, version)
    assert local.engine.adapters.swaps["load"] == 1
    local.run_until(lambda: "late" in local.finished, 2000)
    assert local.tokens["late"] == local.generate(PROMPT, long, version)
