"""What a restart finds: files, jobs, events, adapters, and what was left half done."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coserve.config import LoraModule
from coserve.engine import messages as m
from coserve.errors import ConfigError
from coserve.server.main import bind
from coserve.server.state_dir import StateDir
from tests.server.fake_engine import LINEAR_MODULES, write_peft
from tests.server.running import BASE, ServerThread, wait_for

ROW = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1!"}]}
DATA = "\n".join([json.dumps(ROW)] * 8).encode()


class Home:
    """A state directory whose server is started and stopped."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.server: ServerThread | None = None

    def start(self) -> ServerThread:
        # From the start: jobs that go on by themselves would race with what a test says of them.
        self.server = ServerThread(self.state, auto_train=False)
        return self.server

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = None

    def restart(self) -> ServerThread:
        self.stop()
        return self.start()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.stop()


def create(server: ServerThread, **fields: object) -> str:
    client = server.openai()
    file = client.files.create(file=("t.jsonl", DATA), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body=fields)
    wait_for(lambda: job.id in server.engine.jobs)
    wait_for(lambda: status(server, job.id) == "running")
    return job.id


def status(server: ServerThread, job_id: str) -> str:
    return server.openai().fine_tuning.jobs.retrieve(job_id).status


def steps(server: ServerThread, job_id: str) -> list[int]:
    events = server.openai().fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]  # type: ignore[index]


def test_everything_is_there_again(home: Home) -> None:
    server = home.start()
    job = create(server, adapter="kept")
    server.call(server.engine.train(job))
    wait_for(lambda: status(server, job) == "succeeded")
    before = {path: server.http().get(path).json() for path in ("/v1/files", "/v1/fine_tuning/jobs")}
    digest = server.http().get("/v1/models/kept").json()["digest"]
    server = home.restart()
    assert {path: server.http().get(path).json() for path in before} == before
    assert server.http().get("/v1/models/kept").json()["digest"] == digest
    assert steps(server, job) == [1, 2, 3]
    body = {"model": f"ftckpt-{job[6:]}-3", "messages": [{"role": "user", "content": "Hi"}]}
    assert server.http().post("/v1/chat/completions", json=body).status_code == 200


def test_running_and_paused_jobs_go_on(home: Home) -> None:
    server = home.start()
    running, paused = create(server), create(server)
    server.call(server.engine.step(running, 1, 3))
    assert server.openai().fine_tuning.jobs.pause(paused).status == "paused"
    server = home.restart()
    wait_for(lambda: {running, paused} <= set(server.engine.jobs))
    assert server.engine.jobs[paused].paused and not server.engine.jobs[running].paused
    server.call(server.engine.train(running))
    wait_for(lambda: status(server, running) == "succeeded")
    assert steps(server, running) == [1, 2, 3] and status(server, paused) == "paused"


def test_engine_restart_resubmits(home: Home) -> None:
    server = home.start()
    job = create(server)
    server.engine.jobs.clear()
    server.call(server.engine.on_restart())
    wait_for(lambda: job in server.engine.jobs)
    assert status(server, job) == "running"


def test_unvalidated_job_is_prepared_again(home: Home) -> None:
    server = home.start()
    job = create(server)
    home.stop()
    data = home.state / "jobs" / job / "data"
    for path in data.iterdir():
        path.unlink()
    data.rmdir()
    server = home.start()
    wait_for(lambda: job in server.engine.jobs)
    assert data.is_dir()


@pytest.mark.parametrize("row_written", [False, True])
def test_half_done_publication(home: Home, row_written: bool) -> None:
    """Files without a row are discarded; with a row the publication is completed, once."""
    server = home.start()
    job = create(server, adapter="half")
    path = server.call(server.engine.checkpoint(job, 3))
    if row_written:
        work = server.server.context.adapters.publish("half", path, job_id=job, origin="job")
        digest = server.call(work).version.digest
        server = home.restart()
        wait_for(lambda: status(server, job) == "succeeded")
        assert job not in server.engine.jobs
        assert server.http().get("/v1/models/half").json()["digest"] == digest
    else:
        write_peft(home.state / "adapters" / "half" / "1", modules=LINEAR_MODULES)
        (home.state / "adapters" / "half" / "2.tmp").mkdir()
        (home.state / "files" / "x.tmp").write_bytes(b"")
        server = home.restart()
        assert server.http().get("/v1/models/half").status_code == 404
        assert list(home.state.rglob("*.tmp")) == []
        assert list((home.state / "adapters").glob("*/*")) == []
        wait_for(lambda: job in server.engine.jobs)
        server.call(
            server.engine.emit(m.JobStatus(job_id=job, status="succeeded", result_path=str(path)))
        )
    card = server.http().get("/v1/models/half").json()
    assert card["version"] == 1
    assert server.openai().fine_tuning.jobs.retrieve(job).fine_tuned_model == "half"


def test_a_second_server_is_refused(home: Home) -> None:
    home.start()
    with pytest.raises(ConfigError, match="in use by another server"):
        ServerThread(home.state)


def test_a_newer_schema_is_refused(home: Home) -> None:
    home.start()
    home.stop()
    with sqlite3.connect(home.state / "coserve.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="newer coserve"):
        ServerThread(home.state)


def test_a_port_in_use_is_one_line(home: Home) -> None:
    server = home.start()
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError) as refused:
        bind("127.0.0.1", port, "--port")
    assert str(port) in refused.value.message and "\n" not in refused.value.message


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--state-dir"):
        StateDir(tmp_path / "file" / "state")


def test_lora_modules_make_no_second_version_of_the_same_files(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "source", seed=5)
    for _ in range(2):
        server = ServerThread(tmp_path / "state", lora_modules=(LoraModule("given", str(source)),))
        try:
            assert server.http().get("/v1/models/given").json()["version"] == 1
        finally:
            server.stop()
    with pytest.raises(ConfigError, match="--lora-modules wrong="):
        ServerThread(tmp_path / "state", lora_modules=(LoraModule("wrong", str(tmp_path)),))


def test_the_server_imports_no_torch() -> None:
    code = "import sys, coserve.server.app, coserve.server.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_engine_learnt_is_handed_to_the_next_one_and_arrival_waits_are_a_metric(home: Home) -> None:
    engine = home.start().engine
    path = Path(engine.config.latency_file)
    assert path.parent == home.state and not path.exists()
    stats = m.EngineStats(latency_model='{"learnt": 1}', arrival_waits=[("training", 0.03), ("none", 0.0004)])
    engine.on_stats(stats)
    assert path.read_text() == '{"learnt": 1}'
    engine.on_stats(m.EngineStats())
    text = home.server.http().get("/metrics").text
    assert 'coserve_arrival_wait_seconds_bucket{le="0.025",step="training"} 0.0' in text
    assert 'coserve_arrival_wait_seconds_bucket{le="0.05",step="training"} 1.0' in text
    assert 'coserve_arrival_wait_seconds_count{step="none"} 1.0' in text
    assert home.restart().engine.config.latency_file == str(path)
    assert path.read_text() == '{"learnt": 1}'
