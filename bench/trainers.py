"""Fine-tuning beside a server, ours as a job and the peer's as a script, behind the same few methods."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx
from peft_peer import RANK, Setting, launch, samples
from servers import MODEL, Server, proportional_memory

STEP_WITHIN = 300.0  # seconds, of the first one with what comes before it
ENDLESS = 1_000_000  # steps
POLL = 0.25  # seconds


class Trainer(Protocol):
    """One optimizer step after the other, each over as many tokens."""

    tokens: int

    def progress(self) -> float:
        """Tokens through forward and backward so far; what is half done counts half."""

    def memory(self) -> int:
        """Bytes (PSS) of processes of its own."""


class Metrics:
    """A server's /metrics: sums of samples by their names, over all labels or some."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    @classmethod
    def of(cls, port: int) -> Metrics:
        """What the server on that port says now."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/metrics")
            return cls(connection.getresponse().read().decode())
        finally:
            connection.close()

    def __call__(self, name: str, label: str = "") -> float:
        """The sum of `name`'s samples with `label` (as written, `kind="forward"`) among their labels."""
        pattern = re.compile(re.escape(name) + r"(\{[^}]*\})? (\S+)")
        found = [match for line in self._lines if (match := pattern.match(line))]
        return sum(float(match[2]) for match in found if label in (match[1] or ""))

    def buckets(self, name: str) -> dict[float, float]:
        """A histogram's cumulative counts by upper bound."""
        pattern = re.compile(re.escape(name) + r'_bucket\{(?:[^}]*,)?le="([^"]+)"[^}]*\} (\S+)')
        counts: dict[float, float] = {}
        for line in self._lines:
            if match := pattern.match(line):
                counts[float(match[1])] = counts.get(float(match[1]), 0.0) + float(match[2])
        return counts


def bucket_quantile(before: dict[float, float], after: dict[float, float], q: float) -> float | None:
    """The upper bound under which a share `q` of what came between two readings lies; None of nothing."""
    bounds = sorted(after)
    counts = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    if not counts or counts[-1] <= 0.0:
        return None
    return next(bound for bound, count in zip(bounds, counts, strict=True) if count >= q * counts[-1])


def half_done(forward: float, backward: float, tokens: int) -> float:
    """Tokens of fine-tuning: whole microbatches of `tokens` gone backward, and half of what is forward only.

    How far a backward has come isn't told: half of it is assumed, wrong by a quarter of a microbatch at
    most. A forward whose memory was taken is owed again, and not counted twice.
    """
    ahead = min(max(0.0, forward - backward), tokens)
    return backward + (0.75 * tokens if ahead == tokens else 0.5 * ahead)


class CoserveJob:
    """A job of our server, which it ends with: rank 16 on all linears, one sample of `tokens` a step."""

    def __init__(self, server: Server, vocab: int, tokens: int) -> None:
        self.tokens = tokens
        self._server = server
        ids, _ = samples(vocab, tokens, masked=False)
        url = f"http://127.0.0.1:{server.port}/v1"
        with httpx.Client(timeout=60) as client:

            def post(path: str, **content: Any) -> dict[str, Any]:
                answer = client.post(url + path, **content)
                if answer.status_code != 200:
                    raise RuntimeError(f"{path}: HTTP {answer.status_code}: {answer.text[:500]}")
                return dict(answer.json())

            file = ("sample.jsonl", json.dumps({"token_ids": ids}) + "\n")
            uploaded = post("/files", files={"file": file}, data={"purpose": "fine-tune"})
            training = {
                "batch_size": 1,
                "max_steps": ENDLESS,
                "checkpoint_steps": ENDLESS,
                "warmup_ratio": 0.0,
            }
            job = post(
                "/fine_tuning/jobs",
                json={
                    "model": MODEL,
                    "training_file": uploaded["id"],
                    "adapter": "trained",
                    "seed": 0,
                    "lora": {"r": RANK, "lora_alpha": 2 * RANK},
                    "training": training,
                },
            )
            deadline = time.perf_counter() + STEP_WITHIN
            while Metrics.of(server.port)("coserve_finetune_steps_total") < 1:
                state = client.get(f"{url}/fine_tuning/jobs/{job['id']}").json()
                if state["status"] in ("failed", "cancelled") or time.perf_counter() > deadline:
                    raise RuntimeError(f"the job is {state['status']}: {state.get('error')}")
                time.sleep(POLL)

    def progress(self) -> float:
        """By the tokens gone forward and backward since the server began."""
        now = Metrics.of(self._server.port)
        forward = now("coserve_finetune_tokens_total", 'kind="forward"')
        backward = now("coserve_finetune_tokens_total", 'kind="backward"')
        return half_done(forward, backward, self.tokens)

    def memory(self) -> int:
        """It lives in the server's processes."""
        return 0


class PeftScript:
    """The peer's trainer, a process that runs step after step: PEFT in bf16 autocast, rank 16 on all linears.

    `nice` is its priority, also among sessions where the kernel groups processes by them.
    """

    def __init__(
        self, model: Path, vocab: int, tokens: int, *, tuned: bool, nice: int = 0, passive: bool = False
    ) -> None:
        self.tokens = tokens
        layers = int(json.loads((model / "config.json").read_text())["num_hidden_layers"])
        self._marks_a_step = 2 * layers
        self._steps = self._marks = 0
        self._process = launch(
            "train_on",
            model,
            vocab,
            Setting(tokens, tuned=tuned),
            prefix=("nice", "-n", str(nice)) if nice else (),
            variables={"OMP_WAIT_POLICY": "passive"} if passive else {},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        fcntl.fcntl(self._pipe, fcntl.F_SETFL, fcntl.fcntl(self._pipe, fcntl.F_GETFL) | os.O_NONBLOCK)
        try:
            if nice:
                with suppress(OSError):  # a kernel that doesn't group by sessions has no such file
                    Path(f"/proc/{self._process.pid}/autogroup").write_text(str(nice))
            deadline = time.perf_counter() + STEP_WITHIN
            while self.progress() < tokens:
                if time.perf_counter() > deadline:
                    raise RuntimeError("the peer's trainer has not done a step")
                time.sleep(POLL)
        except BaseException:
            self.close()
            raise

    def progress(self) -> float:
        """Whole steps, and the one under way by the decoder layers passed, forward and backward."""
        with suppress(BlockingIOError):
            while marks := os.read(self._pipe, 1 << 16):
                *ended, under_way = marks.split(b"\n")
                self._marks = len(under_way) + (0 if ended else self._marks)
                self._steps += len(ended)
        if self._process.poll() is not None:
            raise RuntimeError(f"the peer's trainer ended with code {self._process.returncode}")
        return (self._steps + min(1.0, self._marks / self._marks_a_step)) * self.tokens

    def memory(self) -> int:
        """Bytes of its process."""
        return proportional_memory([self._process.pid])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def rate_of_whole_steps(trainer: Trainer, seconds: float) -> float:
    """Tokens/s from the end of one step to the end of another, at least `seconds` later."""

    def next_step() -> float:
        done, deadline = trainer.progress() // trainer.tokens, time.perf_counter() + STEP_WITHIN
        while trainer.progress() // trainer.tokens == done:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"training stands still: no step in {STEP_WITHIN:.0f} s")
            time.sleep(POLL)
        return time.perf_counter()

    began, first = next_step(), trainer.progress() // trainer.tokens
    while (ended := next_step()) < began + seconds:
        pass
    steps = trainer.progress() // trainer.tokens - first
    rate = steps * trainer.tokens / (ended - began)
    print(f"fine-tuning alone: {rate:.0f} tokens/s over {steps:.0f} steps", file=sys.stderr)
    return rate
