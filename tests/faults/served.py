"""A real server as a child process, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

READY = re.compile(r"coserve ready http=(?P<http>\S+) grpc=(?P<grpc>\S+) model=(?P<model>\S+)")
DEADLINE = 120.0  # seconds until a wait is given up as failed


class Served:
    """`coserve serve` with the demo model on free ports; `http` is a client of it."""

    def __init__(self, state_dir: Path, *flags: str) -> None:
        self.state_dir = state_dir
        self._log = state_dir.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "coserve.cli.main", "serve",
                "--port", "0", "--grpc-port", "0", "--state-dir", str(state_dir), *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match = READY.search(line)
            if match:
                break
        else:
            log = state_dir.with_suffix(".log").read_text()[-2000:]
            raise AssertionError(f"no ready line; exit {self.process.wait()}; {log}")
        self.url, self.grpc, self.model = match["http"], match["grpc"], match["model"]
        self.http = httpx.Client(base_url=self.url, timeout=60.0)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    # ------------------------------------------------------------------ calls

    def chat(self, content: str, model: str | None = None, max_tokens: int = 24) -> str:
        """A greedy answer."""
        body = {
            "model": model or self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        answer = self.http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    def start_job(self, examples: int = 24, **body: Any) -> str:
        """Upload a little data set and submit a job over it; returns its id."""
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {i} + {i % 7}?"},
                    {"role": "assistant", "content": f"Aye, captain! {i + i % 7}."},
                ]
            }
            for i in range(examples)
        ]
        data = "\n".join(json.dumps(row) for row in rows).encode()
        sent = self.http.post(
            "/v1/files", files={"file": ("train.jsonl", data)}, data={"purpose": "fine-tune"}
        )
        sent.raise_for_status()
        job = {"model": self.model, "training_file": sent.json()["id"], "seed": 7, **body}
        made = self.http.post("/v1/fine_tuning/jobs", json=job)
        made.raise_for_status()
        return str(made.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the server tells it."""
        return self.http.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()

    def metrics_events(self, job_id: str) -> list[dict[str, Any]]:
        """All metrics events, oldest first."""
        events: list[dict[str, Any]] = []
        after: dict[str, Any] = {}
        while True:
            page = self.http.get(
                f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100, **after}
            ).raise_for_status().json()
            events += page["data"]
            if not page["has_more"]:
                return [event for event in reversed(events) if event["type"] == "metrics"]
            after = {"after": page["data"][-1]["id"]}

    def adapter_files(self, name: str) -> dict[str, bytes]:
        """The published adapter's files."""
        folder = max((self.state_dir / "adapters" / name).iterdir(), key=lambda p: int(p.name))
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}

    # ------------------------------------------------------------------ waiting and killing

    def wait(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition`; a server that is restarting its engine may refuse meanwhile."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                assert self.process.poll() is None, "the server has ended"
            time.sleep(0.05)
        raise AssertionError("waited in vain")

    def wait_for_step(self, job_id: str, step: int) -> None:
        """Until the job has committed `step`."""
        self.wait(lambda: (self.job(job_id)["progress"] or {}).get("step", 0) >= step)

    def wait_for_status(self, job_id: str, status: str) -> None:
        """Until the job is in `status`; another final state fails."""

        def reached() -> bool:
            found = self.job(job_id)
            assert found["status"] == status or found["status"] not in ("failed", "succeeded"), found
            return found["status"] == status

        self.wait(reached)

    @property
    def engine_pid(self) -> int:
        """The engine process, the server's only Python child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            if b"coserve.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise ProcessLookupError("no engine")

    def kill_engine(self) -> None:
        """kill -9 on the engine alone."""
        os.kill(self.engine_pid, signal.SIGKILL)

    def kill(self) -> None:
        """kill -9 on the server; its engine dies with it."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)
