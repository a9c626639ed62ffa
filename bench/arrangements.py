"""The ways to serve and fine-tune on one machine that bench/coserve.py compares, and a point of any."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay import Answer, Traffic, describe, replay
from servers import MODEL, Server, start_coserve, start_vllm
from traces import Arrival
from trainers import CoserveJob, Metrics, PeftScript, Trainer, bucket_quantile

ERROR = "coserve_step_prediction_error_ratio"
POOL = "2GiB"  # ours, for KV and training's activations; the peer has 1 GiB for KV and trains outside of it
WARM = Traffic([Arrival(0.0, 128, 8)] * 8, seconds=4.0, concurrency=8)
SETTLED_WITHIN = 30.0  # seconds


@dataclass(frozen=True)
class Arrangement:
    """Two processes on one machine: what is done about their getting in each other's way.

    `nice` is the trainer's; `passive` makes its idle OpenMP threads sleep instead of spin; `apart` gives each
    process half of the cores; `tuned` gives the trainer the allocator settings that our engine has.
    """

    name: str
    nice: int = 0
    passive: bool = False
    apart: bool = False
    tuned: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {'tuned' if self.tuned else 'default'} allocator"


ARRANGEMENTS = tuple(
    Arrangement(name, tuned=tuned, **how)
    for name, how in (
        ("as they come", {}),
        ("trainer at nice 19", {"nice": 19}),
        ("trainer waits passively", {"passive": True}),
        ("half of the cores each", {"apart": True}),
    )
    for tuned in (False, True)
)


def halves(cores: set[int]) -> tuple[set[int], set[int]]:
    """The server's cores and the trainer's; both the same one where there is but one."""
    ordered = sorted(cores)
    middle = max(1, len(ordered) // 2)
    return set(ordered[:middle]), set(ordered[middle:] or ordered)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started inside is bound to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def coserve_server(model: Path, vocab: int, target_ms: float = 0.0) -> Iterator[Server]:
    """Our server, warm; `target_ms` 0 is the automatic target."""
    with tempfile.TemporaryDirectory() as state:
        flags = ("--kv-cache-memory-bytes", POOL, "--slo-tpot-ms", str(target_ms))
        server = start_coserve(model, Path(state), *flags)
        try:
            replay(server.port, MODEL, vocab, WARM)
            yield server
        finally:
            server.stop()


def coserve_job(server: Server, vocab: int, tokens: int) -> CoserveJob:
    """A job past its first step on a server that has seen requests beside training."""
    job = CoserveJob(server, vocab, tokens)
    replay(server.port, MODEL, vocab, WARM)
    return job


@contextmanager
def vllm_server(model: Path, vocab: int, *, apart: bool) -> Iterator[Server]:
    """The peer's server, warm, on all cores or its half of them."""
    cores = os.sched_getaffinity(0)
    with on_cores(halves(cores)[0] if apart else cores):
        server = start_vllm(model)
    try:
        replay(server.port, MODEL, vocab, WARM)
        yield server
    finally:
        server.stop()


@contextmanager
def peft_script(model: Path, vocab: int, tokens: int, how: Arrangement) -> Iterator[PeftScript]:
    """The peer's trainer, past its first step."""
    cores = os.sched_getaffinity(0)
    with on_cores(halves(cores)[1] if how.apart else cores):
        script = PeftScript(model, vocab, tokens, tuned=how.tuned, nice=how.nice, passive=how.passive)
    with closing(script):
        yield script


def settle(port: int) -> None:
    """Wait until nothing of the replay before is under way."""
    deadline = time.perf_counter() + SETTLED_WITHIN
    while time.perf_counter() < deadline:
        with suppress(OSError):
            now = Metrics.of(port)
            if now("vllm:num_requests_running") + now("vllm:num_requests_waiting") == 0.0:
                return
        time.sleep(0.25)
    print(f"port {port}: requests of the replay before are still under way", file=sys.stderr)


class Watch:
    """Looks at server and trainer now and then while a replay runs."""

    def __init__(self, server: Server, trainer: Trainer | None) -> None:
        self._server, self._trainer = server, trainer
        self._moments: list[tuple[float, float]] = []
        self._errors: list[dict[float, float]] = []
        self._memory = 0

    def __call__(self) -> None:
        """One look."""
        own = self._trainer.memory() if self._trainer else 0
        self._memory = max(self._memory, self._server.memory() + own)
        self._errors.append(Metrics.of(self._server.port).buckets(ERROR))
        if self._trainer:
            self._moments.append((time.perf_counter(), self._trainer.progress()))

    def figures(self, weights: int) -> dict[str, Any]:
        """Training's rate between the first look and the last, the most memory seen, and how far off our
        latency model was (p95)."""
        found: dict[str, Any] = {"trained_tokens_per_second": 0.0}
        if self._moments:
            (began, first), (ended, last) = self._moments[0], self._moments[-1]
            found["trained_tokens_per_second"] = max(0.0, last - first) / (ended - began)
        found |= {"memory_bytes": self._memory, "beyond_weights_bytes": self._memory - weights}
        error = bucket_quantile(self._errors[0], self._errors[-1], 0.95)
        return found if error is None else found | {"prediction_error_p95_under": error}


def measure(
    server: Server, trainer: Trainer | None, model: Path, vocab: int, traffic: Traffic
) -> tuple[list[Answer], dict[str, Any]]:
    """Replay `traffic`; its answers, and the figures of requests, training and memory."""
    settle(server.port)
    watch = Watch(server, trainer)
    answers = replay(server.port, MODEL, vocab, traffic, watch)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return answers, describe(answers, traffic.seconds) | watch.figures(weights)
