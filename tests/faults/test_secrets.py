"""A server as it is run: keys of the environment and of a file that changes, logs that hold no secrets."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from tests.server import provoke

from .served import Served

ADMIN, USE = "sentinelkeyadmin", "sentinelkeyuse"
VARIABLES = {"COSERVE_API_KEY": USE, "COSERVE_ADMIN_API_KEY": ADMIN}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("secrets")
    keys = folder / "keys.toml"
    keys.write_text('[[keys]]\nkey = "sentinelkeyfile"\n')
    os.environ.update(VARIABLES)
    try:
        served = Served(folder / "state", "--keys-file", str(keys), "--kv-cache-memory-bytes", "64MiB")
    finally:
        for name in VARIABLES:
            del os.environ[name]
    with served:
        served.http.headers["authorization"] = f"Bearer {ADMIN}"
        yield served


def logs(served: Served) -> str:
    own = served.state_dir.with_suffix(".log").read_text()
    return own + (served.state_dir / "engine.log").read_text()


def status(served: Served, key: str) -> int:
    return httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code


def test_keys_of_the_environment_go_no_further(keyed: Served) -> None:
    assert status(keyed, USE) == 200 == status(keyed, ADMIN) and status(keyed, "other") == 401
    engine = Path(f"/proc/{keyed.engine_pid}")
    assert b"sentinel" not in (engine / "environ").read_bytes() + (engine / "cmdline").read_bytes()
    assert b"sentinel" not in Path(f"/proc/{keyed.process.pid}/cmdline").read_bytes()


def test_a_signal_reads_the_keys_again(keyed: Served) -> None:
    keys = keyed.state_dir.parent / "keys.toml"
    keys.write_text('[[keys]]\nkey = "sentinelkeynew"\n')
    keyed.process.send_signal(signal.SIGHUP)
    keyed.wait(lambda: status(keyed, "sentinelkeynew") == 200)
    assert status(keyed, "sentinelkeyfile") == 401 and "keys reloaded" in logs(keyed)


def test_logs_hold_no_secrets(keyed: Served) -> None:
    """With real answers, a job, an abort with the client's request id, and an engine that dies."""
    answers = provoke.over_http(keyed.http)
    assert max(answer.status_code for answer in answers) < 500
    with grpc.insecure_channel(keyed.grpc) as channel:
        assert provoke.over_grpc(channel, ADMIN)
    file = next(a.json()["id"] for a in answers if a.request.url.path == "/v1/files" and a.is_success)
    body = {"model": keyed.model, "training_file": file, "adapter": "a", "training": {"n_epochs": 1}}
    job = keyed.http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    keyed.wait_for_status(job, "succeeded")
    endless = {"prompt": provoke.PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with keyed.http.stream(
        "POST", "/v1/completions", json=endless, headers={"x-request-id": "left"}
    ) as answer:
        next(answer.iter_lines())
    keyed.wait(lambda: "request aborted id=left-0-" in logs(keyed))
    with keyed.http.stream("POST", "/v1/completions", json=endless) as answer:
        came = answer.iter_lines()
        next(came)
        keyed.kill_engine()
        rest = "".join(came)
    assert '"error"' in rest
    keyed.wait(lambda: keyed.http.get("/ready").status_code == 200)
    text = logs(keyed).lower()
    assert "sentinel" not in text, [line for line in text.splitlines() if "sentinel" in line][:3]
    assert "traceback" not in text
    assert "sentinel" not in keyed.http.get("/metrics").text
