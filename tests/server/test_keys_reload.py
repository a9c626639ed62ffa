"""The keys file read again while the server runs, its limits, and the command that makes its entries."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from coserve.cli.main import run
from coserve.config import EngineConfig, ServerConfig
from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError
from coserve.server import keys_reload
from coserve.server.auth import digest
from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from coserve.server.keys_file import read_keys_file
from tests.server.running import ServerThread, wait_for

LIMITED = """
[defaults]
requests_per_minute = 3
[[keys]]
key = "{key}"
[[keys]]
key = "small"
role = "tune"
max_upload_bytes = 100
requests_per_minute = 100
[[keys]]
key = "boss"
role = "admin"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(LIMITED.format(key="first"))
    return path


@pytest.fixture
def server(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    monkeypatch.setattr(keys_reload.KeysReload.watch, "__defaults__", (0.02,))
    made = ServerThread(tmp_path / "s", keys_file=str(file), api_keys=("flag",))
    yield made
    made.stop()


def status(server: ServerThread, key: str) -> int:
    with server.http(key) as http:
        return http.get("/version").status_code


def replace(file: Path, text: str) -> None:
    """As configuration tools do it: a new file under the old name."""
    other = file.with_suffix(".new")
    other.write_text(text)
    os.replace(other, file)


def test_a_changed_file_is_read(server: ServerThread, file: Path) -> None:
    assert (status(server, "first"), status(server, "second"), status(server, "flag")) == (200, 401, 200)
    replace(file, LIMITED.format(key="second"))
    wait_for(lambda: status(server, "second") == 200)
    assert (status(server, "first"), status(server, "flag")) == (401, 200)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[keys]]\nkey = ", "neither valid TOML"),
        ('[[keys]]\nkey = "x"\nrole = "king"', "role"),
        ('[[classes]]\nname = "new"\n[[keys]]\nkey = "x"', "restart"),
        ("", "needs a list"),
        (None, "can't read"),
    ],
)
def test_a_broken_file_keeps_the_old_keys_and_says_so(
    server: ServerThread, file: Path, text: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if text is None:
        file.unlink()
    else:
        replace(file, text)
    wait_for(lambda: "keys not reloaded" in caplog.text)
    assert reason in caplog.text and status(server, "first") == 200 and status(server, "x") == 401


def test_the_last_key_can_not_be_taken_away(tmp_path: Path, file: Path) -> None:
    """A server that wanted keys never becomes one that wants none."""
    config = ServerThread(tmp_path / "s", keys_file=str(file))
    try:
        replace(file, "[defaults]\nmax_jobs = 1\n")
        config.server.keys.reload()
        assert status(config, "first") == 200 and status(config, "none") == 401
    finally:
        config.stop()


def test_calls_of_a_minute(server: ServerThread) -> None:
    for key in ("first", "flag"):
        with server.http(key) as http:
            left = [http.get("/v1/models").headers["x-ratelimit-remaining-requests"] for _ in range(3)]
            refused = http.get("/v1/models")
            assert left == ["2", "1", "0"]
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 20
            assert refused.headers["x-ratelimit-limit-requests"] == "3"
            assert refused.json()["error"]["code"] == "requests_per_minute_exceeded"
            assert http.get("/health").status_code == http.get("/version").status_code == 200
    with server.http("boss") as http:  # the defaults are not for those who may do everything
        assert [http.get("/v1/models").status_code for _ in range(9)] == [200] * 9


def test_calls_of_a_minute_over_grpc(server: ServerThread) -> None:
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        meta = [("authorization", "Bearer first")]
        for _ in range(3):
            assert stub.GetServerInfo(inference_pb2.GetServerInfoRequest(), metadata=meta).version
        with pytest.raises(grpc.RpcError) as refusal:
            stub.GetServerInfo(inference_pb2.GetServerInfoRequest(), metadata=meta)
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (status,) = [d for d in rpc_status.from_call(refusal.value).details if d.Is(RetryInfo.DESCRIPTOR)]
    delay = RetryInfo()
    status.Unpack(delay)
    assert 1 <= delay.retry_delay.seconds <= 20


def test_an_upload_over_the_keys_limit(server: ServerThread) -> None:
    row = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    announced = {"filename": "f", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    for key, refused in (("small", True), ("boss", False)):
        with server.http(key) as http:
            sent = http.post("/v1/files", files={"file": ("f", row * 2)}, data={"purpose": "fine-tune"})
            assert (sent.status_code == 413) == refused, sent.text
            begun = http.post("/v1/uploads", json={**announced, "bytes": 101})
            assert (begun.status_code == 400) == refused, begun.text
            packed = http.post("/v1/adapters", params={"name": "n"}, content=b"x" * 101)
            assert packed.status_code == (413 if refused else 400)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ('models = []\nkey = "a"', "models"),
        ('models = ["[a-z]*"]\nkey = "a"', r"models\[0\]"),
        ('models = ["x"]\nrole = "admin"\nkey = "a"', "models"),
        ('tenant = "a b"\nkey = "a"', "tenant"),
        ('requests_per_minute = -1\nkey = "a"', "requests_per_minute"),
        ('key = "a"\n[[keys]]\nkey = "a"', "twice"),
        ('key = "a"\n[defaults]\nweight = 3', "weight"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, entry: str, field: str) -> None:
    path = tmp_path / "k.toml"
    path.write_text(f"[[keys]]\n{entry}\n")
    with pytest.raises(ConfigError, match=field):
        read_keys_file(str(path), LatencyTargets())


def test_keys_that_others_may_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "k.toml"
    plain, hashed = '[[keys]]\nkey = "a"\n', f'[[keys]]\nsha256 = "{digest("a").hex()}"\n'
    for text, mode, warned in ((plain, 0o644, True), (plain, 0o600, False), (hashed, 0o644, False)):
        caplog.clear()
        path.write_text(text)
        path.chmod(mode)
        config = ServerConfig(engine=EngineConfig(model=""), keys_file=str(path))
        keys_reload.KeysReload(config, LatencyTargets())
        assert ("chmod 600" in caplog.text) == warned


# ---------------------------------------------------------------------- the command line


def test_the_command_makes_an_entry_without_the_key_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["keys", "make", "--role", "tune", "--models", "a-*", "--tenant", "team"]) == 0
    printed = capsys.readouterr()
    key = printed.err.split()[-1]
    path = tmp_path / "keys.toml"
    path.write_text(printed.out)
    (entry,) = read_keys_file(str(path), LatencyTargets()).keys
    assert entry.sha256 == digest(key) and key not in printed.out
    assert (entry.role, entry.models, entry.owner) == ("tune", ("a-*",), "team")
    assert run(["keys", "make", "--role", "king"]) == 2


def test_the_command_hashes_a_key_from_standard_input() -> None:
    command = [sys.executable, "-m", "coserve.cli.main", "keys", "hash"]
    done = subprocess.run(command, input="my-key\n", capture_output=True, text=True, check=True)
    assert tomllib.loads(done.stdout)["keys"][0]["sha256"] == digest("my-key").hex()
