"""No log line of any level, no metric and no error carries a prompt, a key, or what the server is made of."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from coserve import log
from coserve.server.http import request_id
from tests.server import provoke
from tests.server.running import ServerThread, wait_for

KEY = "sentinelkeyright"
CLIENTS = ("httpx", "httpcore", "openai", "asyncio", "hypothesis")
INNARDS = re.compile(
    r'Traceback|File "|\.py\b|0x[0-9a-f]{6,}|site-packages|/home/|/root/|sqlite|line \d+, in '
)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("leaks")
    server = ServerThread(
        folder / "s", admin_api_keys=(KEY,), api_keys=("other",), adapter_roots=(str(folder),)
    )
    yield server
    server.stop()


class Lines(logging.Handler):
    """All that is logged, as it would be written, but by the clients of the test."""

    def __init__(self) -> None:
        super().__init__(0)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(CLIENTS):
            self.text += self.format(record) + "\n"


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(1)
    levels = {name: logging.getLogger(name).level for name in log.QUIET}
    for name in levels:
        logging.getLogger(name).setLevel(1)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def refused(answers: list[httpx.Response]) -> list[dict[str, Any]]:
    return [answer.json()["error"] for answer in answers if answer.status_code >= 400]


def test_nothing_leaks(keyed: ServerThread, lines: Lines) -> None:
    with keyed.http(KEY) as http, keyed.channel() as channel:
        answers = provoke.over_http(http)
        said = provoke.over_grpc(channel, KEY)
        file = next(a.json()["id"] for a in answers if a.request.url.path == "/v1/files" and a.is_success)
        job = http.post(
            "/v1/fine_tuning/jobs", json={"training_file": file, "adapter": "sentineladapter"}
        ).json()
        wait_for(lambda: http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] == "succeeded")
        metrics = http.get("/metrics").text
    statuses = {answer.status_code for answer in answers}
    assert {200, 400, 401, 404, 415} <= statuses and max(statuses) < 500 and len(said) > 15
    assert "http id=" in lines.text and lines.text.count("\n") > 50 and "job created" in lines.text
    for word in (provoke.PROMPT, provoke.WRONG_KEY, KEY):
        assert word not in lines.text.lower(), [
            line for line in lines.text.splitlines() if word in line.lower()
        ][:3]
        assert word not in metrics
    for error in refused(answers):
        text = " ".join(str(value) for value in error.values())
        assert not INNARDS.search(text) and str(keyed.config.state_dir) not in text, text
        assert KEY not in text and provoke.WRONG_KEY not in text
        assert len(error["message"]) < 1000, error
    for text in said:
        assert not INNARDS.search(text) and KEY not in text and provoke.WRONG_KEY not in text, text


def test_a_fault_of_ours_tells_the_client_nothing(
    keyed: ServerThread, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("at /root/secret.py")

    monkeypatch.setattr(keyed.server.context.tokenizer, "encode", broken)
    with keyed.http(KEY) as http:
        answer = http.post("/tokenize", json={"prompt": "x"})
    assert answer.status_code == 500 and not INNARDS.search(answer.text) and "ZeroDivision" not in answer.text
    assert answer.headers["x-request-id"] and "ZeroDivisionError" in lines.text


@pytest.mark.parametrize(
    "given", ["", "a b", "a\tb", "é", "x" * 129, "a\r\nset-cookie: x", "a\x00b", "\x7f", "a\u2028b"]
)
def test_request_ids_that_are_replaced(given: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", request_id(given))


def test_a_request_id_reaches_the_engine(keyed: ServerThread, lines: Lines) -> None:
    """As its own, one for each sample, though two requests give the same; the answer and the log have it."""
    keyed.engine.requests.clear()
    body = {"prompt": "Hi", "max_tokens": 2, "n": 2}
    odd = "id\"='%s{0}<b>"
    with keyed.http(KEY) as http:
        for name in ("same", "same", odd):
            answer = http.post("/v1/completions", json=body, headers={"x-request-id": name})
            assert answer.headers["x-request-id"] == name and answer.json()["id"] == f"cmpl-{name}"
    names = [add.request_id for add in keyed.engine.requests]
    assert len(set(names)) == 6 and sum(name.startswith("same-") for name in names) == 4
    assert sum(name.startswith(f"{odd}-") for name in names) == 2
    wait_for(lambda: "<b>" in lines.text)
    assert "http id=same " in lines.text
    (line,) = [line for line in lines.text.splitlines() if "<b>" in line]
    assert line.count("id=") == 1 and 'id="id\\"=' in line


def test_a_request_id_over_grpc(keyed: ServerThread) -> None:
    from coserve.server.grpc_gen import inference_pb2 as pbi
    from coserve.server.grpc_gen import inference_pb2_grpc

    keyed.engine.requests.clear()
    with keyed.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(
            pbi.GenerateRequest(prompt="Hi", sampling_params={"max_tokens": 2}),
            metadata=[("authorization", f"Bearer {KEY}"), ("x-request-id", "mine")],
        )
        assert list(call)
        assert dict(call.trailing_metadata())["x-request-id"] == "mine"
        refused = stub.Generate(pbi.GenerateRequest(prompt="Hi"), metadata=[("x-request-id", "other")])
        assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(refused.trailing_metadata())["x-request-id"] == "other"
    assert keyed.engine.requests[0].request_id.startswith("mine-0-")


def test_an_open_server_on_an_open_address_says_so(tmp_path: Path, lines: Lines) -> None:
    for host, keys, warned in (("0.0.0.0", (), True), ("0.0.0.0", ("k",), False), ("127.0.0.1", (), False)):
        lines.text = ""
        ServerThread(tmp_path / "s", host=host, api_keys=keys).stop()
        assert ("may do everything" in lines.text) == warned


def test_where_the_state_lies_is_not_told(keyed: ServerThread) -> None:
    """Adapters and files are named by what clients called them."""
    with keyed.http(KEY) as http:
        for path in ("/v1/adapters", "/v1/files", "/v1/fine_tuning/jobs", "/v1/aliases", "/version", "/load"):
            assert str(keyed.config.state_dir) not in http.get(path).text


def test_the_state_is_for_the_server_alone(keyed: ServerThread) -> None:
    assert Path(keyed.config.state_dir).stat().st_mode & 0o077 == 0
