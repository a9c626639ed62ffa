"""Many streams at once, readers that stop reading, and more requests than there are places for."""

from __future__ import annotations

import json
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest

from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from tests.faults.served import Served
from tests.server.push_engine import PushEngine
from tests.server.running import ServerThread, wait_for

TOKENS = 60
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    server = ServerThread(tmp_path_factory.mktemp("pushed"), engine_class=PushEngine)
    yield server
    server.stop()


def body(tokens: int, **more: object) -> dict[str, object]:
    message = {"role": "user", "content": "Go on."}
    return {"messages": [message], "max_tokens": tokens, "stream": True, "ignore_eos": True, **more}


def request_bytes(content: dict[str, object]) -> bytes:
    data = json.dumps(content).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "host: h", "content-type: application/json"]
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


def address(url: str) -> tuple[str, int]:
    host, _, port = url.rsplit("/", 1)[-1].rpartition(":")
    return host, int(port)


@dataclass
class Seen:
    """What one HTTP stream gave."""

    data: bytearray = field(default_factory=bytearray)

    @property
    def done(self) -> bool:
        return self.data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    def tokens(self) -> int:
        lines = [line[6:] for line in bytes(self.data).split(b"\n") if line.startswith(b"data: {")]
        return json.loads(lines[-1])["usage"]["completion_tokens"]


def read_streams(place: tuple[str, int], count: int, tokens: int) -> list[Seen]:
    """So many streams at once, each to its end, by one thread."""
    content = request_bytes(body(tokens, stream_options={"include_usage": True}))
    seen: list[Seen] = []
    with selectors.DefaultSelector() as ready:
        for _ in range(count):
            connection = socket.create_connection(place, timeout=60)
            connection.sendall(content)
            seen.append(Seen())
            ready.register(connection, selectors.EVENT_READ, seen[-1])
        while ready.get_map():
            found = ready.select(120)
            assert found, "nothing came for two minutes"
            for key, _ in found:
                got = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                key.data.data.extend(got)
                if key.data.done or not got:
                    ready.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return seen


def read_calls(target: str, count: int, tokens: int) -> list[int]:
    """Tokens that each of so many gRPC streams gave."""
    sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
    request = pb.GenerateRequest(prompt="Go on.", sampling_params=sampling)
    with grpc.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.Generate(request, timeout=600) for _ in range(count)]
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda call: sum(len(part.token_ids) for part in call), calls))


def check_streams(url: str, target: str, over_http: int, over_grpc: int) -> None:
    calls: list[int] = []
    thread = threading.Thread(target=lambda: calls.extend(read_calls(target, over_grpc, TOKENS)))
    thread.start()
    seen = read_streams(address(url), over_http, TOKENS)
    thread.join(600)
    assert [one.tokens() for one in seen if one.done] == [TOKENS] * over_http
    assert calls == [TOKENS] * over_grpc


def test_a_hundred_streams_end_whole(pushed: ServerThread) -> None:
    check_streams(pushed.url, pushed.server.grpc_address, 80, 20)


@pytest.mark.long
def test_five_hundred_streams_end_whole(tmp_path: Path) -> None:
    with Served(tmp_path / "state") as server:
        check_streams(server.url, server.grpc, 400, 100)
        stats = server.http.get("/metrics").text
        assert 'request_success_total{engine="0",finished_reason="length"' in stats
        assert 'finished_reason="error",model_name="coserve-demo"} 0.0' in stats


def test_a_reader_that_stops_is_cut_off_and_others_go_on(pushed: ServerThread) -> None:
    engine = pushed.engine
    before = len(engine.aborted)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(address(pushed.url))
        slow.sendall(request_bytes(body(200_000)))
        assert slow.recv(100)
        check_streams(pushed.url, pushed.server.grpc_address, 3, 3)
        wait_for(lambda: len(engine.aborted) > before, 30)
        rest = b""
        while b"[DONE]" not in rest:  # it reads on: what was kept, and the reason
            got = slow.recv(1 << 20)
            assert got
            rest = rest[-2000:] + got
        assert b'"code":"reader_too_slow"' in rest
    assert len(engine.aborted) == before + 1


def test_a_call_that_is_not_read_is_cut_off(pushed: ServerThread) -> None:
    engine = pushed.engine
    before = len(engine.aborted)
    sampling = pb.SamplingParams(max_tokens=200_000, ignore_eos=True)
    with pushed.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="Go on.", sampling_params=sampling))
        next(call)
        wait_for(lambda: len(engine.aborted) > before, 30)
        with pytest.raises(grpc.RpcError) as raised:
            for _ in call:
                pass
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "behind" in raised.value.details()
    assert len(engine.aborted) == before + 1


def test_a_call_that_stays_unread_ends(tmp_path: Path) -> None:
    server = ServerThread(tmp_path, engine_class=PushEngine, http_timeout=1.0)
    lifecycle = server.server.context.lifecycle
    sampling = pb.SamplingParams(max_tokens=200_000, ignore_eos=True)
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(prompt="Go on.", sampling_params=sampling))
        next(call)
        wait_for(lambda: lifecycle.in_flight == 0, 30)
        assert len(server.engine.aborted) == 1
        with pytest.raises(grpc.RpcError):
            for _ in call:
                pass
        assert read_calls(server.server.grpc_address, 3, TOKENS) == [TOKENS] * 3
    server.stop()


def test_one_of_several_answers_that_are_not_read(pushed: ServerThread) -> None:
    """What n answers keep for their reader is bounded for each of them, and all of them end."""
    engine = pushed.engine
    before = len(engine.aborted)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(address(pushed.url))
        slow.sendall(request_bytes(body(200_000, n=3)))
        assert slow.recv(100)
        wait_for(lambda: len(engine.aborted) >= before + 3, 30)
    wait_for(lambda: pushed.server.context.lifecycle.in_flight == 0, 30)
    assert len(engine.aborted) == before + 3


def test_a_server_with_calls_under_way_stops_without_a_traceback(tmp_path: Path) -> None:
    with Served(tmp_path / "state", "--shutdown-timeout", "1") as server:
        assert read_calls(server.grpc, 5, 20) == [20] * 5
        sampling = pb.SamplingParams(max_tokens=1900, ignore_eos=True)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            calls = [
                stub.Generate(pb.GenerateRequest(prompt="Go on.", sampling_params=sampling)) for _ in range(3)
            ]
            for call in calls:
                next(call)
            server.process.send_signal(signal.SIGTERM)
            for call in calls:  # ended by the server, or whole where it was quick
                with suppress(grpc.RpcError):
                    list(call)
            assert server.process.wait(30) == 0
    log = (tmp_path / "state.log").read_text()
    assert "Traceback" not in log and "draining" in log


def test_more_than_may_wait_are_refused_with_a_time(tmp_path: Path) -> None:
    flags = ("--max-num-seqs", "2", "--max-num-queued-reqs", "2")
    with Served(tmp_path / "state", *flags) as server:

        def one(number: int) -> httpx.Response:
            content = body(80, stream=False, seed=number)
            return httpx.post(f"{server.url}{CHAT}", json=content, timeout=60)

        with ThreadPoolExecutor(24) as threads:
            answers = list(threads.map(one, range(24)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) < 24
        for answer in refused:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        assert one(0).status_code == 200
