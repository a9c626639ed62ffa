"""Whatever is killed when: requests get an error they may retry, jobs end with the same adapter (I6)."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import httpx
import pytest

from .served import Served

JOB = {"adapter": "captain", "training": {"n_epochs": 3, "batch_size": 4, "checkpoint_steps": 3}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[float]]:
    """The job's adapter and losses when nothing goes wrong."""
    with Served(tmp_path_factory.mktemp("quiet") / "state") as served:
        job_id = served.start_job(**JOB)
        served.wait_for_status(job_id, "succeeded")
        losses = [event["data"]["train_loss"] for event in served.metrics_events(job_id)]
        return served.adapter_files("captain"), losses


def check_job(served: Served, job_id: str, undisturbed: tuple[dict[str, bytes], list[float]]) -> None:
    """The job ended as if nothing had happened, each step told once."""
    served.wait_for_status(job_id, "succeeded")
    events = served.metrics_events(job_id)
    assert [event["data"]["step"] for event in events] == list(range(1, len(events) + 1))
    assert [event["data"]["train_loss"] for event in events] == undisturbed[1]
    assert served.adapter_files("captain") == undisturbed[0]
    assert served.chat("What is 3 + 4?", "captain")


def test_a_killed_engine_comes_back_and_the_job_goes_on(tmp_path: Path, undisturbed) -> None:
    with Served(tmp_path / "state") as served:
        before = served.chat("Who are you?")
        job_id = served.start_job(**JOB)
        served.wait_for_step(job_id, 4)
        served.kill_engine()
        served.wait(lambda: served.chat("Who are you?") == before)
        assert served.http.get("/ready").status_code == 200
        check_job(served, job_id, undisturbed)


def test_requests_in_flight_get_a_503_they_may_retry(tmp_path: Path) -> None:
    with Served(tmp_path / "state") as served:
        answers: list[httpx.Response] = []
        body = {"model": served.model, "prompt": "a", "max_tokens": 2000, "ignore_eos": True}
        held = {"structured_outputs": {"regex": "(red|blue){3,}"}}

        def ask(**fields: object) -> None:
            answers.append(httpx.post(f"{served.url}/v1/completions", json=body | fields, timeout=60.0))

        asking = [threading.Thread(target=ask), threading.Thread(target=ask, kwargs=held)]
        for thread in asking:
            thread.start()
        served.wait(lambda: running(served) == 2)
        served.kill_engine()
        for thread in asking:
            thread.join()
        for answer in answers:
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] and "retry-after" in answer.headers
        served.wait(lambda: bool(served.chat("Who are you?")))
        # The engine that came back knows no grammar, nor which requests had one.
        ask(**held, max_tokens=20)
        assert re.match("(red|blue){3}", answers[2].json()["choices"][0]["text"])


def running(served: Served) -> int:
    """Requests that run."""
    lines = served.http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("vllm:num_requests_running")]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in found)


def test_a_killed_server_leaves_a_state_that_goes_on(tmp_path: Path, undisturbed) -> None:
    state = tmp_path / "state"
    with Served(state) as served:
        job_id = served.start_job(**JOB)
        served.wait_for_step(job_id, 5)
        served.kill()
    with Served(state) as served:
        check_job(served, job_id, undisturbed)


def test_sigterm_checkpoints_and_a_later_start_goes_on(tmp_path: Path, undisturbed) -> None:
    state = tmp_path / "state"
    with Served(state) as served:
        job_id = served.start_job(**JOB)
        served.wait_for_step(job_id, 2)
        assert served.terminate() == 0
    assert list((state / "jobs" / job_id / "checkpoints").iterdir())
    log = state.with_suffix(".log").read_text()
    assert "Traceback" not in log
    with Served(state) as served:
        check_job(served, job_id, undisturbed)


def test_a_second_server_on_the_same_state_is_refused(tmp_path: Path) -> None:
    with Served(tmp_path / "state"), pytest.raises(AssertionError, match="exit 2"):
        Served(tmp_path / "state")
