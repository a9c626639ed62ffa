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
    server.call(server.engine.step(healthy, 1, 9))
    die(server)
    # The suspects are tried one at a time; the healthy one commits a step, which lets the other one in.
    wait_for(lambda: len(server.engine.jobs) == 1)
    if healthy in server.engine.jobs:
        server.call(server.engine.step(healthy, 2, 9))
        begun(server, poison, healthy)
        die(server)
    for _ in range(FATAL_DEATHS):
        wait_for(lambda: set(server.engine.jobs) == {poison})
        server.call(server.engine.step(poison, 1, 3))  # replayed: no progress
        assert job(server, poison)["status"] == "running"
        die(server)
    begun(server, healthy)
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


def make() -> tuple[EngineDeaths, list[str]]:
    released: list[str] = []
    return EngineDeaths(released.append), released


def test_deaths_of_a_job_alone_are_counted_until_it_moves() -> None:
    deaths, _ = make()
    assert [deaths.count({"a": 5}), deaths.count({"a": 5}), deaths.count({"a": 5})] == [[], [], ["a"]]
    assert [deaths.count({"b": 1}), deaths.count({"b": 1}), deaths.count({"b": 2})] == [[], [], []]
    assert [deaths.count({"b": 2}), deaths.count({}), deaths.count({"b": 2})] == [[], [], []]


def test_suspects_are_tried_one_at_a_time_and_newcomers_wait() -> None:
    deaths, released = make()
    assert deaths.count({"a": 5, "b": 3}) == []
    assert deaths.admits("a", 5) and not deaths.admits("b", 3) and not deaths.admits("new", 0)
    deaths.progressed("a", 5)
    assert released == []
    deaths.progressed("a", 6)
    assert released == ["b"] and deaths.admits("b", 3) and not deaths.admits("new", 0)
    deaths.report("b", "running")
    assert deaths.take_in_hand() == {"b"} and deaths.count({"b": 3}) == []
    assert deaths.admits("b", 3), "it is tried again"
    deaths.report("b", "paused")
    assert released == ["b", "new"]
    deaths.clear("new")
    assert deaths.admits("anyone", 0) and deaths.admits("b", 3)


def test_one_that_ends_while_it_waits_is_passed_over() -> None:
    deaths, released = make()
    deaths.count({"a": 0, "b": 0, "c": 0})
    deaths.clear("b")
    assert released == []
    deaths.report("a", "failed")
    assert released == ["c"]


@pytest.mark.parametrize("names", [["bad", "good", "fine"], ["good", "bad", "fine"], ["good", "fine", "bad"]])
def test_an_innocent_never_fails_beside_a_bad_one(names: list[str]) -> None:
    """The bad job kills every engine that has it before its next step; the others commit a step whenever
    they are let in."""
    deaths, _ = make()
    steps, over, died = dict.fromkeys(names, 4), [], 0
    in_hand: list[str] = []
    while died < 10:
        for job_id in [name for name in names if name not in (*over, *in_hand)]:
            if deaths.admits(job_id, steps[job_id]):
                in_hand.append(job_id)
                deaths.report(job_id, "running")
        if "bad" in in_hand:
            died += 1
            deaths.take_in_hand()
            for job_id in deaths.count({job_id: steps[job_id] for job_id in in_hand}):
                over.append(job_id)
                deaths.clear(job_id)
            in_hand = []
            continue
        for job_id in in_hand:
            steps[job_id] += 1
            deaths.progressed(job_id, steps[job_id])
        if over and len(in_hand) == 2:
            break
    assert over == ["bad"] and died <= 2 * FATAL_DEATHS
    assert steps["good"] > 4 and steps["fine"] > 4


def test_who_is_in_hand() -> None:
    deaths, _ = make()
    for job_id in ("a", "b", "c"):
        deaths.report(job_id, "running")
    deaths.report("b", "paused")
    deaths.submitting = "d"
    assert deaths.take_in_hand() == {"a", "c", "d"}
    assert deaths.take_in_hand() == set()
