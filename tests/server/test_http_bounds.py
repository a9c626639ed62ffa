"""What a connection may cost: large heads, stalling clients, bodies of two lengths, other pages."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.errors import ConfigError, Unavailable
from coserve.server.cors import Cors
from coserve.server.http import BodyMemory
from coserve.server.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_TARGET_BYTES
from tests.server.running import BASE, ServerThread, wait_for

TIMEOUT = 0.4
PAGE = "https://app.example"
CHAT = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}'


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("bounds")
    made = ServerThread(
        folder / "s", http_timeout=TIMEOUT, api_keys=("k",), admin_api_keys=("t",), allowed_origins=(PAGE,)
    )
    yield made
    made.stop()


class Raw:
    """A connection on which anything can be sent."""

    def __init__(self, server: ServerThread, buffer: int = 0) -> None:
        address = urlsplit(server.url)
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(10)
        self.socket.connect((address.hostname, address.port))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        got = b""
        try:
            while piece := self.socket.recv(65536):
                got += piece
        except ConnectionError:
            pass
        return got


def request(
    path: str = "/v1/chat/completions", *headers: str, body: bytes = CHAT, method: str = "POST"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: h", "Authorization: Bearer k", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    lines += ["Content-Type: application/json", "", ""]
    return "\r\n".join(lines).encode() + body


def refusal(answer: bytes) -> tuple[int, str]:
    """(status, code) of an answer in OpenAI's envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and b"nosniff" in head
    assert b"x-request-id: " in head
    return int(head.split()[1]), error["code"]


# ---------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request(f"/v1/models?{'x' * (MAX_TARGET_BYTES + 1)}"), 414),
        (request("/v1/models", *[f"x-{n}: 1" for n in range(MAX_HEADERS)]), 431),
        (request("/v1/models", f"x-large: {'y' * (MAX_HEAD_BYTES + 1)}"), 431),
        (request("/v1/models", f"{'y' * (MAX_HEAD_BYTES + 1)}: 1"), 431),
    ],
    ids=["target", "headers", "value", "name"],
)
def test_a_head_over_its_limits(bounded: ServerThread, head: bytes, status: int) -> None:
    with Raw(bounded) as raw:
        raw.send(head)
        assert refusal(raw.rest())[0] == status
    with bounded.http("k") as http:
        wide = {f"x-{n}": "v" * 300 for n in range(100)}
        assert http.get("/v1/models", headers=wide).status_code == 200


@pytest.mark.parametrize("piece", [b"x-more: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["many", "one"])
def test_a_head_without_an_end_is_not_kept(bounded: ServerThread, piece: bytes) -> None:
    """It's cut off at the limit, however it grows; httptools itself knows none."""
    with Raw(bounded) as raw:
        raw.send(b"GET /v1/models HTTP/1.1\r\nx-first: ")
        sent = 0
        try:
            while sent < 64 * 2**20:
                raw.send(piece)
                sent += len(piece)
        except ConnectionError:
            pass
        assert sent < 32 * 2**20


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"GET /v1/\x00models HTTP/1.1\r\n\r\n",
        b"CONNECT other.example:443 HTTP/1.1\r\n\r\n",
        request("/v1/models", "bad header: 1"),
        request("/v1/models", "x: a\r\n folded: b"),
        request(body=CHAT).replace(b"Host: h\r\n", b"Host: h\r\nx: a\rb\r\n"),
    ],
)
def test_what_is_no_http_gets_an_envelope(bounded: ServerThread, data: bytes) -> None:
    with Raw(bounded) as raw:
        raw.send(data)
        assert refusal(raw.rest())[0] in (400, 404, 405)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Content-Length: 66"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
        ("Content-Length: +5",),
        ("Content-Length: 0x5",),
        ("Content-Length: -1",),
        ("Content-Length: 5, 5",),
    ],
)
def test_a_body_of_two_lengths_is_refused(bounded: ServerThread, headers: tuple[str, ...]) -> None:
    """A proxy might read another end of it, and take the rest for the next request."""
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer k\r\n\r\n"
    with Raw(bounded) as raw:
        raw.send(request("/v1/chat/completions", *headers, body=smuggled))
        answer = raw.rest()
    assert refusal(answer) == (400, "invalid_http") and answer.count(b"HTTP/1.1 ") == 1


def test_chunked_bodies(bounded: ServerThread) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (CHAT[:7], CHAT[7:])) + b"0\r\n\r\n"
    with Raw(bounded) as raw:
        raw.send(
            request("/v1/chat/completions", "Transfer-Encoding: chunked", "Connection: close", body=chunks)
        )
        assert raw.rest().startswith(b"HTTP/1.1 200 ")
    with Raw(bounded) as raw:
        broken = b"zz\r\nnothing\r\n"
        raw.send(request("/v1/chat/completions", "Transfer-Encoding: chunked", body=broken))
        assert refusal(raw.rest()) == (400, "invalid_http")


def test_pipelined_requests_are_answered_in_order_before_what_is_broken(bounded: ServerThread) -> None:
    with Raw(bounded) as raw:
        good = request("/v1/models", method="GET", body=b"")
        raw.send(good + good + b"nonsense\r\n\r\n")
        answer = raw.rest()
    assert answer.count(b"HTTP/1.1 200 ") == 2


def test_a_heap_of_pipelined_requests(bounded: ServerThread) -> None:
    """Each would hold its place in memory: those over the limit aren't read."""
    with Raw(bounded) as raw:
        raw.send(request("/v1/models", method="GET", body=b"") * 300)
        assert raw.rest().count(b"HTTP/1.1 200 ") == MAX_PIPELINED + 1


SEEDS = [
    request("/v1/models", method="GET", body=b""),
    request(),
    request("/v1/chat/completions", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
    request("/v1/files", "Content-Type: multipart/form-data; boundary=b", body=b"--b\r\n\r\n\r\n--b--\r\n"),
]
PIECES = st.sampled_from(
    [b"\r\n", b"\r", b"\n", b":", b" ", b"\0", b"\xff", b"0", b"chunked", b"%00", b"HTTP/1.0"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_bytes_of_any_kind(
    bounded: ServerThread, caplog: pytest.LogCaptureFixture, seed: bytes, data: st.DataObject
) -> None:
    """A request with some of its bytes changed gets an answer of its own fault, or none."""
    for _ in range(data.draw(st.integers(1, 3))):
        place, gone = data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, 3))
        piece = data.draw(PIECES | st.binary(max_size=4))
        seed = seed[:place] + piece + seed[place + gone :]
    with Raw(bounded) as raw:
        raw.send(seed)
        raw.socket.shutdown(socket.SHUT_WR)
        for answer in re.findall(rb"^HTTP/1\.1 (\d{3})", raw.rest(), re.MULTILINE):
            assert int(answer) < 500
    assert httpx.get(f"{bounded.url}/health", verify=False).status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# ---------------------------------------------------------------------- stalling


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /v1/mod",
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\n",
        request("/v1/chat/completions", "Content-Length: 100", body=b'{"mess'),
        request("/v1/chat/completions", "Transfer-Encoding: chunked", body=b"5\r\nab"),
        request("/v1/adapters?name=a", "Content-Length: 100", body=b"--x").replace(b"Bearer k", b"Bearer t"),
    ],
    ids=["nothing", "line", "headers", "body", "chunk", "file"],
)
def test_a_client_that_stalls_is_cut_off(bounded: ServerThread, start: bytes) -> None:
    with Raw(bounded) as raw:
        raw.send(start)
        answer = raw.rest()
    assert answer == b"" if not start else refusal(answer) == (408, "request_timeout")


def test_a_client_that_drips_is_cut_off(bounded: ServerThread) -> None:
    """A byte now and then keeps neither headers nor a body open."""
    for start in (
        b"GET /v1/models HTTP/1.1\r\nx: ",
        request("/v1/chat/completions", "Content-Length: 9999", body=b""),
    ):
        with Raw(bounded) as raw, pytest.raises(ConnectionError):
            raw.send(start)
            for _ in range(400):
                raw.send(b" ")
                time.sleep(0.02)


def test_connections_at_rest_are_closed_whatever_comes_between_requests(bounded: ServerThread) -> None:
    """Empty lines before a request are allowed, but they are no request."""
    with Raw(bounded) as raw:
        raw.send(request("/v1/models", method="GET", body=b"") + b"\r\n")
        raw.send(b"\r\n")
        assert raw.rest().startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_loses_its_place(bounded: ServerThread) -> None:
    """Its request ends once nothing has been taken for so long."""
    lifecycle = bounded.server.context.lifecycle
    bounded.engine.reply = "word " * 40
    body = json.dumps(
        {"prompt": "Hi", "stream": True, "n": 64, "max_tokens": 200, "ignore_eos": True, "logprobs": 20}
    ).encode()
    with Raw(bounded, buffer=4096) as raw:
        raw.send(request("/v1/completions", body=body))
        assert wait_for(lambda: lifecycle.in_flight) == 1
        wait_for(lambda: not lifecycle.in_flight)


def test_a_stream_may_rest_as_long_as_it_likes(bounded: ServerThread) -> None:
    """The timeout is for clients: an answer that takes the server longer is not cut."""
    bounded.engine.hold.clear()
    body = {"model": BASE, "prompt": "Hi", "stream": True, "max_tokens": 4}
    with bounded.http("k") as http, http.stream("POST", "/v1/completions", json=body) as answer:
        time.sleep(3 * TIMEOUT)
        bounded._loop.call_soon_threadsafe(bounded.engine.hold.set)
        assert "".join(answer.iter_text()).endswith("data: [DONE]\n\n")


def test_bodies_share_a_bounded_memory() -> None:
    memory = BodyMemory(100)
    first, second = memory.share(), memory.share()
    first.take(60)
    with pytest.raises(Unavailable):
        second.take(60)
    first.release()
    first.release()
    second.take(100)
    assert memory.left == 0


def test_an_early_answer_does_not_wait_for_the_body(bounded: ServerThread) -> None:
    """Whoever has no key is told so at once, and can't go on sending for ever."""
    with Raw(bounded) as raw:
        raw.send(request("/v1/files", "Content-Length: 99999999", body=b"").replace(b"Bearer k", b"Bearer x"))
        assert b"HTTP/1.1 401 " in raw.socket.recv(65536)
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                raw.send(b"x" * 1000)
                time.sleep(0.01)


# ---------------------------------------------------------------------- upgrades, pages


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_no_other_protocol_is_spoken(bounded: ServerThread, protocol: str) -> None:
    """In particular none that would come past the keys."""
    with Raw(bounded) as raw:
        upgrade = ("Connection: Upgrade", f"Upgrade: {protocol}", "Sec-WebSocket-Version: 13")
        raw.send(
            request("/v1/models", *upgrade, "Sec-WebSocket-Key: eA==", method="GET", body=b"").replace(
                b"Bearer k", b"Bearer x"
            )
        )
        assert raw.rest().startswith(b"HTTP/1.1 401 ")


def test_security_headers(bounded: ServerThread) -> None:
    with bounded.http("k") as http:
        for path in ("/v1/models", "/health", "/nowhere", "/metrics"):
            headers = http.get(path).headers
            assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_a_preflight_needs_no_key(bounded: ServerThread) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    wanted = {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    with bounded.http() as http:
        answer = http.options("/v1/chat/completions", headers=asked | wanted)
        assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == PAGE
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == wanted["access-control-request-headers"]
        assert "access-control-allow-credentials" not in answer.headers and "Origin" in answer.headers["vary"]
        other = http.options("/v1/models", headers=asked | {"origin": "https://evil.example"})
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
        assert http.options("/v1/models").status_code == 401  # no browser's question
        refused = http.get("/v1/models", headers={"origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
    with bounded.http("k") as http:
        assert http.get("/v1/models", headers={"origin": PAGE}).headers["access-control-allow-origin"] == PAGE
        evil = http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert evil.status_code == 200 and "access-control-allow-origin" not in evil.headers


def test_cross_origin_is_off_unless_asked_for(http: httpx.Client) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    answer = http.options("/v1/models", headers=asked)
    assert answer.status_code == 405 and not [n for n in answer.headers if n.startswith("access-control")]
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": PAGE}).headers


def test_a_page_can_not_change_an_open_server(http: httpx.Client) -> None:
    """Browsers send uploads and empty POSTs of any page without a preflight."""
    form = {"files": {"file": ("f", b"x")}, "data": {"purpose": "user_data"}}
    for origin in (PAGE, "null"):
        refused = http.post("/v1/files", headers={"origin": origin}, **form)
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "origin_not_allowed"
    own = f"http://{http.base_url.netloc.decode()}"
    assert http.post("/v1/files", headers={"origin": own}, **form).status_code == 200


def test_all_origins_never_with_credentials() -> None:
    cors = Cors(["*"])
    assert cors.headers({b"origin": PAGE.encode()})["access-control-allow-origin"] == "*"
    preflight = cors.preflight("OPTIONS", {b"origin": b"x", b"access-control-request-method": b"GET"})
    assert preflight is not None and "access-control-allow-credentials" not in preflight.headers
    for wrong in ("example.com", "https://a.b/path", "https://a, https://b", ""):
        with pytest.raises(ConfigError, match="--allowed-origins"):
            Cors([wrong])
