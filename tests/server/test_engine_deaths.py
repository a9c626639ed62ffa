"""A job that the engine keeps dying of is given up; every other job goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coserve.engine import messages as m
from coserve.errors import Unavailable
from coserve.server.application.engine_deaths import FATAL_DEATHS, EngineDeaths
from coserve.training.job import JobSpec
from tests.server.running import BASE, ServerThread, wait_for

ROW = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1!"}]}
DATA = "\n".join([json.dumps(ROW)] * 8).encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    server = ServerThread(tmp_path / "state")
    server.engine.auto_train = False
    yield server
    server.stop()


def create(server: ServerThread) -> str:
    client = server.openai()
    file = client.files.create(file=("t.jsonl", DATA), purpose="fine-tune").id
    return client.fine_tuning.jobs.create(model=BASE, training_file=file).id


def job(server: ServerThread, job_id: str) -> dict:
    return server.http().get(f"/v1/fine_tuning/jobs/{job_id}").json()


def begun(server: ServerThread, *job_ids: str) -> None:
    """Wait until the engine has told of all these jobs that they run."""
    wait_for(lambda: set(job_ids) <= set(server.engine.jobs))
    wait_for(lambda: all(job(server, job_id)["status"] == "running" for job_id in job_ids))


def die(server: ServerThread) -> None:
    """The engine dies, and a new one is ready that knows no job."""

    async def again() -> None:
        server.engine.jobs.clear()
        await server.engine.on_restart()

    server.call(again())


def test_a_job_the_engine_keeps_dying_of_is_given_up(server: ServerThread) -> None:
    poison, healthy = create(server), create(server)
    begun(server, poison, healthy)
    server.call(server.engine.step(poison, 1, 3))
    for death in range(FATAL_DEATHS):
        assert job(server, poison)["status"] == "running"
        server.call(server.engine.step(healthy, death + 1, 9))
        die(server)
        begun(server, healthy, *([poison] if death + 1 < FATAL_DEATHS else []))
    given_up = job(server, poison)
    assert (given_up["status"], given_up["error"]["code"]) == ("failed", "engine_died")
    assert "after step 1;" in given_up["error"]["message"] and "log" in given_up["error"]["message"]
    assert poison not in server.engine.jobs
    assert server.openai().fine_tuning.jobs.list_events(poison, limit=1).data[0].level == "error"
    server.call(server.engine.step(healthy, 9, 9))
    path = server.call(server.engine.checkpoint(healthy, 9))
    done = m.JobStatus(job_id=healthy, status="succeeded", result_path=str(path))
    server.call(server.engine.emit(done))
    assert job(server, healthy)["status"] == "succeeded"


def test_a_replayed_step_is_no_progress_and_a_paused_job_is_not_counted(server: ServerThread) -> None:
    poison, paused = create(server), create(server)
    begun(server, poison, paused)
    assert server.openai().fine_tuning.jobs.pause(paused).status == "paused"
    for _ in range(FATAL_DEATHS):
        wait_for(lambda: {poison, paused} <= set(server.engine.jobs))
        server.call(server.engine.step(poison, 1, 3))
        die(server)
    assert "after step 1;" in job(server, poison)["error"]["message"]
    wait_for(lambda: paused in server.engine.jobs)
    assert job(server, paused)["status"] == "paused"


def test_an_engine_that_dies_of_a_submission(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def die_of_it(spec: JobSpec) -> None:
        tried.append(spec.job_id)
        server.engine.ready = False
        raise Unavailable("The engine stopped and is being restarted.")

    submit = server.engine.submit_job
    monkeypatch.setattr(server.engine, "submit_job", die_of_it)
    poison = create(server)
    for death in range(1, FATAL_DEATHS + 1):
        wait_for(lambda death=death: tried == [poison] * death)
        if death == FATAL_DEATHS:
            monkeypatch.setattr(server.engine, "submit_job", submit)
        server.engine.ready = True
        die(server)
    wait_for(lambda: job(server, poison)["status"] == "failed")
    assert "before its first step" in job(server, poison)["error"]["message"]
    other = create(server)
    begun(server, other)
    assert poison not in server.engine.jobs


def test_counting() -> None:
    deaths = EngineDeaths()
    assert deaths.count({"a": 5, "b": 0}) == []
    assert deaths.count({"a": 5, "b": 1}) == []
    assert deaths.count({"a": 5, "b": 1}) == ["a"]
    assert deaths.count({"b": 1}) == ["b"]
    assert [deaths.count({"c": 1}), deaths.count({"c": 1}), deaths.count({}), deaths.count({"c": 1})] == [
        []
    ] * 4


def test_who_is_in_hand() -> None:
    deaths = EngineDeaths()
    for job_id in ("a", "b", "c"):
        deaths.report(job_id, "running")
    deaths.report("b", "paused")
    deaths.submitting = "d"
    assert deaths.take_in_hand() == {"a", "c", "d"}
    assert deaths.take_in_hand() == set()
