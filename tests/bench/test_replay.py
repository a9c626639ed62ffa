"""Replays: what answers come to, the client process against a small server, the frontier's arithmetic."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import frontier
import pytest
import replay
import traces
import trainers
from arrangements import halves
from replay import Answer, Traffic


def answer(ttft: float, gaps: list[float], output: int | None = None, *, done: bool = True) -> Answer:
    chunks = [1.0 + ttft]
    for gap in gaps:
        chunks.append(chunks[-1] + gap)
    return Answer(0.9, 1.0, output or len(chunks), tuple(chunks), done)


def test_a_trace_is_scaled_to_a_load_and_capped() -> None:
    arrivals = [traces.Arrival(t, p, o) for t, p, o in ((0.0, 900, 3), (0.5, 40, 200), (9.0, 128, 64))]
    shaped = traces.at_rate(traces.capped(arrivals, 128, 64), 0.25 * 4.0, 12.0)
    assert len(shaped) == 12 and shaped[-1].time < 12.0
    assert [(a.prompt_tokens, a.output_tokens) for a in shaped[:3]] == [(128, 3), (40, 64), (128, 64)]
    assert len(traces.at_rate(arrivals, 2.0, 12.0)) == 24


def test_an_answers_times() -> None:
    one = answer(0.2, [0.05, 0.15], output=5)
    assert one.ttft == pytest.approx(0.2) and one.tpot == pytest.approx(0.2 / 4)
    assert one.gaps == pytest.approx([0.05, 0.15])
    assert answer(0.2, []).tpot is None and answer(0.2, [0.1], done=False).tpot is None
    assert Answer(0.0, 0.0, 4, (), False, "refused").ttft is None


def test_goodput_counts_all_that_were_sent() -> None:
    answers = [
        answer(0.1, [0.05, 0.05]),
        answer(0.1, [0.05, 0.2]),
        answer(0.9, [0.01]),
        answer(0.1, []),
        answer(0.1, [0.05], done=False),
    ]
    assert replay.goodput(answers, 0.1) == pytest.approx(3 / 5)
    assert replay.goodput(answers, 0.1, ttft=0.5) == pytest.approx(2 / 5)
    assert replay.goodput([], 0.1) is None


def test_tokens_of_a_time_count_for_what_a_finished_stream_owed() -> None:
    answers = [answer(0.0, [1.0, 1.0, 1.0], output=8), answer(0.5, [1.0], output=9, done=False)]
    assert replay.tokens_between(answers, 0.0, 2.6) == pytest.approx(2 * 2 + 2)


def test_figures_of_nothing_are_none() -> None:
    row = replay.describe([Answer(0.0, 0.0, 4, (), False, "RuntimeError: HTTP 429: busy")], 2.0)
    assert (row["requests"], row["served"], row["refused"]) == (1, 0, 1)
    assert row["tpot_ms_p50_p99"] == [None, None] and row["errors"] == ["RuntimeError: HTTP 429: busy"]


class Stream(BaseHTTPRequestHandler):
    """Three chunks, 20 ms apart; prompts of 7 tokens are refused, of 9 never end."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(429 if len(body["prompt"]) == 7 else 200)
        self.end_headers()
        for _ in range(3):
            self.wfile.write(b'data: {"choices": [{"text": " a"}]}\n\n')
            self.wfile.flush()
            time.sleep(0.02)
        if len(body["prompt"]) == 9:
            time.sleep(5.0)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_the_client_sends_when_due_and_notes_each_chunk(port: int) -> None:
    lengths = [(0.0, 5), (0.1, 7), (0.1, 9), (0.2, 5)]
    traffic = Traffic([traces.Arrival(due, prompt, 3) for due, prompt in lengths], 0.3)
    with replay.Client(port, "m", 1000, traffic, drain=1.0) as client:
        client.begin()
        answers = client.answers()
    assert [a.due for a in answers] == [0.0, 0.1, 0.1, 0.2]
    assert all(a.sent >= a.due for a in answers)
    good = [a for a in answers if a.done]
    assert len(good) == 2 and all(len(a.chunks) == 3 and min(a.gaps) > 0.0 for a in good)
    refused = next(a for a in answers if a.error)
    assert "HTTP 429" in refused.error and not refused.done
    endless = next(a for a in answers if not a.done and not a.error)
    assert len(endless.chunks) == 3


def test_a_closed_loop_keeps_as_many_in_flight_until_its_time_is_over(port: int) -> None:
    looks: list[int] = []
    traffic = Traffic([traces.Arrival(0.0, 5, 3)] * 2, 0.5, concurrency=2)
    answers = replay.replay(port, "m", 1000, traffic, lambda: looks.append(1), every=0.2)
    assert len([a for a in answers if a.done]) > 2 and max(a.sent for a in answers) < 0.5
    assert len(looks) >= 3


def row(trained: float, tpot: float | None, name: str = "") -> frontier.Row:
    return {"arrangement": name, "trained_tokens_per_second": trained, "tpot_ms_p50_p99": [tpot, tpot]}


def test_the_best_arrangement_trains_most_at_an_acceptable_tpot() -> None:
    rows = [row(15, 190, "as they come"), row(5, 100, "nice"), row(52, 376, "passive"), row(72, 140, "apart")]
    assert frontier.best_arrangement(rows, 44.0)["arrangement"] == "apart"
    assert frontier.best_arrangement(rows[:3], 44.0)["arrangement"] == "nice"
    assert frontier.best_arrangement(rows[:3], 10.0)["arrangement"] == "nice"  # none is: the shortest TPOT
    assert frontier.best_arrangement([*rows, row(90, None, "dead")], 44.0)["arrangement"] == "apart"
    with pytest.raises(ValueError, match="served"):
        frontier.best_arrangement([row(90, None)], 44.0)


def test_eta_u_and_rho() -> None:
    both = {
        "trained_tokens_per_second": 60.0,
        "generated_tokens_per_second": 50.0,
        "itl_ms_p50_p99": [30, 90],
    }
    alone = {"itl_ms_p50_p99": [25, 60]}
    shares = frontier.shares(both, 150.0, 100.0, alone)
    assert shares == pytest.approx({"eta": 0.4, "u": 0.9, "rho": 1.5})
    assert frontier.shares(both, 150.0, 100.0, None)["rho"] is None
    assert frontier.ratio(1.0, 0.0) is None and frontier.ratio(None, 2.0) is None


def test_what_came_between_two_readings_of_a_histogram() -> None:
    before = {0.05: 10.0, 0.1: 10.0, 0.2: 10.0, float("inf"): 10.0}
    after = {0.05: 100.0, 0.1: 106.0, 0.2: 109.0, float("inf"): 110.0}
    assert trainers.bucket_quantile(before, after, 0.95) == 0.1
    assert trainers.bucket_quantile(before, after, 0.99) == 0.2
    assert trainers.bucket_quantile(after, after, 0.95) is None
    assert trainers.bucket_quantile({}, {}, 0.95) is None


def test_halves_of_the_cores() -> None:
    assert halves({0, 1}) == ({0}, {1})
    assert halves({2, 5, 7}) == ({2}, {5, 7})
    assert halves({3}) == ({3}, {3})


def test_the_table_has_a_line_for_each_point() -> None:
    both = {"server": "coserve", "arrangement": "coserve", "target": "65 ms", "load": 0.5, "eta": 0.456}
    both |= {"trained_tokens_per_second": 71.6, "memory_bytes": 3 << 30, "goodput": None}
    both |= {f"{name}_ms_p50_p99": [12.3, None] for name in ("ttft", "tpot", "itl")}
    rows = [{"arrangement": "training alone", "server": "coserve"}, both, {"what": "x", "failed": "why"}]
    header, rule, line = frontier.table(rows).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") == len(frontier.COLUMNS) + 1
    assert line == "| coserve, target 65 ms | 50% | 72 | 0.46 |  |  |  | 12/ | 12/ | 12/ | 3.0 |"


def test_fine_tuned_tokens_from_what_went_forward_and_backward() -> None:
    assert trainers.half_done(1024 + 256, 1024, 512) == 1024 + 128
    assert trainers.half_done(1024 + 512, 1024, 512) == 1024 + 384  # somewhere in its backward
    assert trainers.half_done(1024 + 900, 1024, 512) == 1024 + 384  # some of it went forward twice
    assert trainers.half_done(1024, 1024, 512) == 1024


def test_samples_are_summed_over_labels() -> None:
    metrics = trainers.Metrics(
        'tokens_total{kind="forward"} 5.0\ntokens_total{kind="backward"} 3.0\ntokens_total_created 9.0\n'
        'steps_total 4.0\nerror_bucket{le="0.1"} 2.0\nerror_bucket{engine="0",le="+Inf"} 7.0\n'
    )
    assert metrics("tokens_total") == 8.0 and metrics("tokens_total", 'kind="forward"') == 5.0
    assert metrics("steps_total") == 4.0 and metrics("absent") == 0.0
    assert metrics.buckets("error") == {0.1: 2.0, float("inf"): 7.0}


def test_a_lower_load_asks_for_some_of_a_higher_ones_requests() -> None:
    trace = [traces.Arrival(3.0 * index, index + 1, 1) for index in range(40)]  # 120 s, 20 requests a minute
    half, all_of_it = (traces.sampled(trace, rate, 60.0, most=1.0) for rate in (0.5, 1.0))
    assert (len(half), len(all_of_it)) == (30, 60)  # three periods over each other
    assert set(half) < set(all_of_it)
    assert all(0.0 <= a.time < 60.0 for a in all_of_it)
    assert all_of_it == sorted(all_of_it, key=lambda a: a.time)
    early = [a for a in traces.sampled(trace, 1 / 3, 60.0, most=1 / 3) if a.prompt_tokens <= 20]
    assert [a.time for a in early] == [3.0 * (a.prompt_tokens - 1) for a in early]  # in real time
