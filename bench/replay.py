"""Arrivals replayed against a live server by a client process, and what its answers say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import quantile
from traces import Arrival

DRAIN = 20.0  # seconds that requests may take to end after the last arrival; later ones count as missed
LEAD = 0.3  # seconds between the client's "ready" and its first request


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request, in seconds since the replay began; `chunks` are when its tokens came."""

    due: float
    sent: float
    output_tokens: int
    chunks: tuple[float, ...]
    done: bool
    error: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds from sending it to its first token."""
        return self.chunks[0] - self.sent if self.chunks else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a token after the first; None of one token, or unfinished."""
        if not self.done or self.output_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent: the arrivals in the order of time (open loop), or with `concurrency` as many of them at
    once, over `seconds` (closed loop)."""

    arrivals: Sequence[Arrival]
    seconds: float
    concurrency: int = 0
    seed: int = 0


class Client:
    """The client process; used in a `with`, which ends it whatever happens."""

    def __init__(self, port: int, model: str, vocab: int, traffic: Traffic, drain: float = DRAIN) -> None:
        plan = {
            "port": port,
            "model": model,
            "vocab": vocab,
            "seed": traffic.seed,
            "seconds": traffic.seconds,
            "drain": drain if not traffic.concurrency else 0.0,
            "concurrency": traffic.concurrency,
            "arrivals": [(a.time, a.prompt_tokens, a.output_tokens) for a in traffic.arrivals],
        }
        program = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import replay_client as c; "
        self._process = subprocess.Popen(
            [sys.executable, "-c", program + "c.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._say(json.dumps(plan))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client process ended with code {self._process.wait()}")
        return line

    def begin(self) -> float:
        """Let it begin; returns the moment (`time.perf_counter`) of its time 0."""
        self._hear()
        began = time.perf_counter() + LEAD
        self._say(repr(began))
        time.sleep(LEAD)
        return began

    def answers(self) -> list[Answer]:
        """All of them, once the last has ended or the drain is over."""
        return [
            Answer(**{**record, "chunks": tuple(record["chunks"])}) for record in json.loads(self._hear())
        ]


def replay(
    port: int,
    model: str,
    vocab: int,
    traffic: Traffic,
    watch: Callable[[], Any] = lambda: None,
    every: float = 15.0,
) -> list[Answer]:
    """Send `traffic` and return what became of it. `watch` is called when it begins, when its `seconds` are
    over, and about `every` so many seconds in between."""
    with Client(port, model, vocab, traffic) as client:
        began = client.begin()
        watch()
        while (left := began + traffic.seconds - time.perf_counter()) > 0:
            time.sleep(min(every, left))
            watch()
        return client.answers()


def tokens_between(answers: Sequence[Answer], begin: float, end: float) -> float:
    """Generated tokens that came in that time; a chunk of a finished stream may stand for more than one."""
    total = 0.0
    for answer in answers:
        came = sum(begin <= moment < end for moment in answer.chunks)
        total += came * (answer.output_tokens / len(answer.chunks) if answer.done else 1.0)
    return total


def goodput(answers: Sequence[Answer], tpot: float, ttft: float | None = None) -> float | None:
    """Share of all requests sent that were answered whole, within these targets (seconds); one token has no
    TPOT. None of no requests."""
    if not answers:
        return None

    def met(answer: Answer) -> bool:
        in_time = ttft is None or (answer.ttft is not None and answer.ttft <= ttft)
        return answer.done and in_time and (answer.tpot is None or answer.tpot <= tpot)

    return sum(map(met, answers)) / len(answers)


def describe(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """The figures of a replay whose arrivals took `seconds`; times in milliseconds, p50 and p99."""

    def pair(values: Sequence[float | None]) -> list[float | None]:
        known = [value for value in values if value is not None]
        found = (quantile(known, q) for q in (0.5, 0.99))
        return [None if value is None else round(value * 1e3, 2) for value in found]

    errors = sorted({answer.error for answer in answers if answer.error})
    return {
        "requests": len(answers),
        "served": sum(answer.done for answer in answers),
        "refused": sum(answer.error.startswith("RuntimeError: HTTP 429") for answer in answers),
        "requests_per_second": len(answers) / seconds,
        "generated_tokens_per_second": tokens_between(answers, 0.0, seconds) / seconds,
        "ttft_ms_p50_p99": pair([answer.ttft for answer in answers]),
        "tpot_ms_p50_p99": pair([answer.tpot for answer in answers]),
        "itl_ms_p50_p99": pair([gap for answer in answers for gap in answer.gaps]),
        "sent_late_ms_p99": pair([answer.sent - answer.due for answer in answers])[1],
    } | ({"errors": errors[:3]} if errors else {})
