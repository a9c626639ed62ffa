"""Upstream defects of clients that leave, held against a whole server: it frees what they had, counts it
once, and serves the next as if they had not been."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from tests.defects import scrape
from tests.faults.served import Served

ASKED = 1500
BODY = {"prompt": "Count to 50:", "max_tokens": ASKED, "ignore_eos": True, "temperature": 0}
Way = Callable[[Served], Callable[[], None]]
# Sends a request and waits for what never comes; killed, it has no chance to say goodbye.
CLIENT = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"content-type": "application/json"})
urllib.request.urlopen(request).read()
"""


def by_closing(served: Served, stream: bool) -> Callable[[], None]:
    """A plain connection with a request under way; what is returned closes it."""
    address = urlsplit(served.url)
    data = json.dumps(BODY | {"stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    connection.sendall(head.encode() + data)
    return connection.close


def by_dying(served: Served) -> Callable[[], None]:
    """A client in a process of its own; what is returned kills it."""
    url = f"{served.url}/v1/completions"
    process = subprocess.Popen([sys.executable, "-c", CLIENT, url, json.dumps(BODY | {"stream": True})])

    def end() -> None:
        process.kill()
        process.wait()

    return end


def by_grpc(served: Served, seconds: float | None = None) -> Callable[[], None]:
    """A call; what is returned cancels it, unless its deadline has come."""
    sampling = inference_pb2.SamplingParams(max_tokens=ASKED, ignore_eos=True, temperature=0)
    request = inference_pb2.GenerateRequest(prompt=str(BODY["prompt"]), sampling_params=sampling)
    channel = grpc.insecure_channel(served.grpc)
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=seconds)

    def end() -> None:
        if seconds is None:
            call.cancel()
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        late, left = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED
        assert ended.value.code() is (left if seconds is None else late)
        channel.close()

    return end


WAYS: dict[str, Way] = {
    "stream": lambda served: by_closing(served, True),
    "unary": lambda served: by_closing(served, False),
    "killed": by_dying,
    "grpc": by_grpc,
}


@pytest.mark.parametrize("way", WAYS)
def test_who_leaves_frees_what_they_had_and_counts_once(served: Served, way: str) -> None:
    """vllm#9428, vllm#10806, vllm#54947: the request of a client that had closed a stream, left before its
    answer, or died, ran to its end. vllm#31503: it counted twice, or as one that stopped. vllm#22545,
    vllm#29928: after the last one the gauges stood where they were until the next request."""
    http = served.http
    served.wait(lambda: scrape.at_rest(http))
    reasons, tokens = scrape.ended(http), scrape.value(http, "vllm:generation_tokens_total")
    leave = WAYS[way](served)
    served.wait(lambda: scrape.value(http, "vllm:num_requests_running") == 1.0)
    assert scrape.value(http, "vllm:kv_cache_usage_perc") > 0.0
    leave()
    served.wait(lambda: scrape.at_rest(http))
    served.wait(lambda: scrape.ended(http) != reasons)
    assert scrape.ended(http) - reasons == {"abort": 1} and reasons - scrape.ended(http) == {}
    assert scrape.value(http, "vllm:generation_tokens_total") - tokens < ASKED


def test_a_deadline_aborts_and_counts_once(served: Served) -> None:
    """vllm#31503, over gRPC: nobody cancels, the time that the client gave is over."""
    http = served.http
    served.wait(lambda: scrape.at_rest(http))
    reasons, tokens = scrape.ended(http), scrape.value(http, "vllm:generation_tokens_total")
    by_grpc(served, 0.2)()
    served.wait(lambda: scrape.ended(http) != reasons)
    served.wait(lambda: scrape.at_rest(http))
    assert scrape.ended(http) - reasons == {"abort": 1} and reasons - scrape.ended(http) == {}
    assert scrape.value(http, "vllm:generation_tokens_total") - tokens < ASKED


@pytest.mark.parametrize("way", WAYS)
def test_the_next_answer_is_as_if_nobody_had_left(served: Served, way: str) -> None:
    """sglang#36552: the request after a disconnect got a wrong answer."""
    question = "What is 7 + 5?"
    expected = served.chat(question)
    for _ in range(2):
        leave = WAYS[way](served)
        served.wait(lambda: scrape.value(served.http, "vllm:num_requests_running") >= 1.0)
        leave()
        assert served.chat(question) == expected


def test_many_who_leave_at_once_leave_nothing(served: Served) -> None:
    """vllm#22545: with everything aborted, those that still waited too, the gauges fall without traffic."""
    leaving = [by_closing(served, stream=bool(number % 2)) for number in range(24)]
    served.wait(lambda: scrape.value(served.http, "vllm:num_requests_running") > 1.0)
    for leave in leaving:
        leave()
    served.wait(lambda: scrape.at_rest(served.http))
    waiting = "vllm:num_requests_waiting_by_reason"
    assert scrape.value(served.http, waiting) == 0.0 == scrape.value(served.http, "coserve_adapter_requests")


def test_who_stays_hears_on_while_others_leave(served: Served) -> None:
    """The engine's messages were no longer read after aborts of many at once, until the next request came:
    who still had a stream waited for ever."""
    body = BODY | {"max_tokens": 600, "stream": True, "stream_options": {"include_usage": True}}
    with served.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        next(lines)
        leaving = [by_closing(served, stream=bool(number % 2)) for number in range(16)]
        served.wait(lambda: scrape.value(served.http, "vllm:num_requests_running") > 8.0)
        for leave in leaving:
            leave()
        *_, last = lines
    assert json.loads(last[6:])["usage"]["completion_tokens"] == 600


def test_counters_are_exact_and_no_series_is_there_twice(served: Served) -> None:
    """vllm#18053: with several processes of the server, counters were of one of them, and series came twice.
    One process serves here; its counts are those that clients have in their hands."""
    http = served.http
    names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "http_requests_total")
    before, reasons = {name: scrape.value(http, name) for name in names}, scrape.ended(http)
    usages = []
    for number in range(6):
        body = {
            "prompt": f"Spell cat {number}",
            "max_tokens": 5 + number,
            "ignore_eos": True,
            "n": 1 + number % 3,
        }
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
        usages.append((answer["usage"], body["n"]))
    grown = {name: scrape.value(http, name) - before[name] for name in names}
    assert grown["vllm:generation_tokens_total"] == sum(usage["completion_tokens"] for usage, _ in usages)
    assert grown["vllm:prompt_tokens_total"] == sum(usage["prompt_tokens"] * n for usage, n in usages)
    assert grown["http_requests_total"] == len(usages)
    assert scrape.ended(http) - reasons == {"length": sum(n for _, n in usages)}
    series = [(name, labels) for name, labels, _ in scrape.samples(http)]
    assert len(series) == len(set(series)) > 100
