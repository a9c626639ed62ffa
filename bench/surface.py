"""What the server's own process costs: processor time per token, and the time to an error's first byte.

100 streams over HTTP (chat, server-sent events) and over gRPC, of an engine stand-in that gives each of them
one token a step at a fixed pace (`paced_engine.py`), so that only the API server is measured: runs of two
lengths, the longer one's processor time less the shorter one's over the tokens between them, so that neither
starting a request nor an idle server counts. The real engine with the demo model follows in the rows.
"""

from __future__ import annotations

import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import grpc
import paced_engine
from http_load import free_port

from coserve.server.grpc_gen import inference_pb2

HERE = Path(__file__).resolve().parent
STREAMS = 100
CHANNELS = 4  # gRPC connections that the streams share
KEY, LIMITED = "bench-key", "bench-limited"
KEYS = [
    {"name": "bench", "key": KEY, "role": "admin"},
    {"name": "limited", "key": LIMITED, "role": "use", "tokens_per_minute": 1},
]
CHAT = "/v1/chat/completions"
GENERATE = "/coserve.v1.InferenceService/Generate"
PAUSE = 1.0  # seconds without requests in which the idle server is measured


@dataclass(frozen=True)
class Served:
    """A server under measurement."""

    pid: int
    port: int
    grpc: str

    def processor_seconds(self) -> float:
        """Processor time of the API server's process so far; its engine is another process."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes (RSS) of that process."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmRSS"))


Drive = Callable[[Served, int, int], None]  # server, streams, tokens of each; returns when all have ended


@contextmanager
def serving(program: list[str], pace: float) -> Iterator[Served]:
    """A server with the demo model's tokenizer, its engine paced or real."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.json"
        keys.write_text(json.dumps({"keys": KEYS}))
        port, grpc_port = free_port(), free_port()
        command = [sys.executable, *program, "serve", "--port", str(port), "--grpc-port", str(grpc_port)]
        command += ["--state-dir", f"{folder}/state", "--keys-file", str(keys)]
        command += ["--max-num-seqs", str(STREAMS), "--kv-cache-memory-bytes", "512MiB"]
        environment = {**os.environ, "COSERVE_BENCH_PACE": str(pace)}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=HERE.parent,
        )
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("coserve ready"):
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield Served(process.pid, port, f"127.0.0.1:{grpc_port}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


# ---------------------------------------------------------------------- streams


def body(tokens: int, **more: Any) -> bytes:
    """A chat request for exactly `tokens`."""
    fields = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": tokens}
    return json.dumps({**fields, "stream": True, "ignore_eos": True, "temperature": 0, **more}).encode()


def head(length: int, key: str = KEY) -> bytes:
    """The request's head."""
    lines = [f"POST {CHAT} HTTP/1.1", "host: bench", "content-type: application/json"]
    lines += [f"content-length: {length}", f"authorization: Bearer {key}", "", ""]
    return "\r\n".join(lines).encode()


def over_http(served: Served, streams: int, tokens: int) -> None:
    """Bare sockets: the client should cost little beside the server."""
    content = body(tokens)
    ready = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(head(len(content)) + content)
        ready.register(connection, selectors.EVENT_READ)
        tails[connection] = b""
    while tails:
        for key, _ in ready.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            got = connection.recv(1 << 16)
            tails[connection] = (tails[connection] + got)[-64:]
            if b"[DONE]" in tails[connection]:
                ready.unregister(connection)
                connection.close()
                del tails[connection]
            elif not got:
                raise RuntimeError(f"a stream ended early: {tails[connection]!r}")


def over_grpc(served: Served, streams: int, tokens: int) -> None:
    """Calls on a few connections; answers stay bytes, so that the client doesn't read them."""
    sampling = inference_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    messages = [inference_pb2.ChatMessage(role="user", content="Say something.")]
    request = inference_pb2.GenerateRequest(messages=messages, sampling_params=sampling).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(served.grpc, options=options) for _ in range(CHANNELS)]
    generate = [channel.unary_stream(GENERATE) for channel in channels]
    metadata = [("authorization", f"Bearer {KEY}")]
    calls = [generate[place % CHANNELS](request, metadata=metadata) for place in range(streams)]
    received: list[int] = []

    def read(call: Any) -> None:
        received.append(sum(1 for _ in call))

    threads = [threading.Thread(target=read, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for channel in channels:
        channel.close()
    if len(received) != streams or min(received) < 1:
        raise RuntimeError("a gRPC stream failed")


def token_cost(served: Served, drive: Drive, streams: int, lengths: tuple[int, int]) -> dict[str, float]:
    """Microseconds of the server's processor time per token and per request."""
    began, before = time.perf_counter(), served.processor_seconds()
    time.sleep(PAUSE)
    idle = (served.processor_seconds() - before) / (time.perf_counter() - began)
    spent = []
    for tokens in lengths:
        began, before = time.perf_counter(), served.processor_seconds()
        drive(served, streams, tokens)
        seconds = time.perf_counter() - began
        spent.append(served.processor_seconds() - before - idle * seconds)
    per_token = (spent[1] - spent[0]) / (streams * (lengths[1] - lengths[0]))
    per_request = spent[0] / streams - per_token * lengths[0]
    return {
        "us_per_token": per_token * 1e6,
        "us_per_request": per_request * 1e6,
        "tokens_per_second": streams * lengths[1] / seconds,
        "server_cores": spent[1] / seconds,
        "rss_mb": served.memory() / 1e6,
    }


# ---------------------------------------------------------------------- errors


def error_times(served: Served, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from sending a request that is refused to the first byte of the answer."""
    good = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 1}
    refused: list[tuple[int, str, str, dict[str, Any]]] = [
        (401, CHAT, "wrong", good),
        (404, "/v1/none", KEY, good),
        (404, CHAT, KEY, {**good, "model": "nobody"}),
        (400, CHAT, KEY, {**good, "temperature": 9}),
        (429, CHAT, LIMITED, good),
    ]
    rows = []
    drained = {"authorization": f"Bearer {LIMITED}", "content-type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.request("POST", CHAT, json.dumps(good), drained)  # from now on over its limit
    connection.getresponse().read()
    for status, path, key, fields in refused:
        times = []
        for _ in range(rounds):
            content = json.dumps(fields)
            began = time.perf_counter()
            headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
            connection.request("POST", path, content, headers)
            answer = connection.getresponse()
            times.append((time.perf_counter() - began) * 1e3)
            answer.read()
            if answer.status != status:
                raise RuntimeError(f"{path} answered {answer.status}, not {status}")
        rows.append(
            {"error": f"{status} {path}", "ms_p50": median(times), "ms_p99": common.quantile(times, 0.99)}
        )
    connection.close()
    return rows


def grpc_error_times(served: Served, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from a call that is refused to its status."""
    codes = grpc.StatusCode
    refused: list[tuple[grpc.StatusCode, str, dict[str, Any]]] = [
        (codes.UNAUTHENTICATED, "wrong", {}),
        (codes.NOT_FOUND, KEY, {"model": "nobody"}),
        (codes.INVALID_ARGUMENT, KEY, {"sampling_params": {"temperature": 9}}),
        (codes.RESOURCE_EXHAUSTED, LIMITED, {}),
    ]
    rows = []
    with grpc.insecure_channel(served.grpc) as channel:
        generate = channel.unary_stream(GENERATE)
        for code, key, fields in refused:
            request = inference_pb2.GenerateRequest(prompt="Say something.", **fields).SerializeToString()
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                found = generate(request, metadata=[("authorization", f"Bearer {key}")]).code()
                times.append((time.perf_counter() - began) * 1e3)
                if found is not code:
                    raise RuntimeError(f"a call ended with {found.name}, not {code.name}")
            at_p99 = common.quantile(times, 0.99)
            rows.append({"error": f"gRPC {code.name}", "ms_p50": median(times), "ms_p99": at_p99})
    return rows


def measure(quick: bool, only: str) -> dict[str, Any]:
    """All rows, and the headline."""
    lengths, rounds, repeats = ((20, 60), 20, 1) if quick else ((40, 240), 200, 3)
    rows: list[dict[str, Any]] = []
    drives: dict[str, Drive] = {"http": over_http, "grpc": over_grpc}
    programs = {"paced": ["-c", paced_engine.SERVE], "real": ["-m", "coserve.cli.main"]}
    costs: dict[str, list[float]] = {name: [] for name in drives}
    for engine, program in programs.items():
        with serving(program, pace=0.05) as served:
            over_http(served, STREAMS, 10)  # warm
            for _ in range(repeats if engine == "paced" else 1):
                for name, drive in drives.items():
                    if only and only != name:
                        continue
                    cost = token_cost(served, drive, STREAMS, lengths)
                    rows.append({"engine": engine, "over": name, "streams": STREAMS, **cost})
                    print(json.dumps(rows[-1]), flush=True)
                    if engine == "paced":
                        costs[name].append(cost["us_per_token"])
            if engine == "paced":
                rows += error_times(served, rounds) + grpc_error_times(served, rounds)
        if only:
            break
    figures = {name: median(found) for name, found in costs.items() if found}
    load = {"concurrency": STREAMS, "output_tokens": lengths[1], **{f"us_{k}": v for k, v in figures.items()}}
    what = "processor time of the API server per streamed token, the dearer of HTTP and gRPC"
    return {"headline": common.headline(what, "us", [max(figures.values())], [], load), "rows": rows}


def main() -> None:
    """Measure and write the result."""
    given = common.arguments(
        __doc__ or "", lambda parser: parser.add_argument("--only", choices=("http", "grpc"), default="")
    )
    common.write("surface", given.out, measure(given.quick, given.only))


if __name__ == "__main__":
    main()
