"""The demo whole, in its short form: a real server, real chat, a real fine-tune; and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "COSERVE_TEST_MARK"
PROMISES = 5


def heed_ctrl_c() -> None:
    """In the child: a shell that runs us in the background would have Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Demo:
    """A short demo as a child; every process that comes from it carries the same mark in its environment."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.demo", "--quick"],
            cwd=ROOT,
            env={**os.environ, MARK: self.mark, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_ctrl_c,
        )

    def left_behind(self) -> list[int]:
        """Ids of the processes that still carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process.pid)
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found


@pytest.fixture
def demo() -> Iterator[Demo]:
    running = Demo()
    yield running
    if running.process.poll() is None:
        running.process.terminate()
    running.process.communicate()


def test_every_promise_of_the_demo_holds(demo: Demo) -> None:
    said, _ = demo.process.communicate(timeout=280)
    assert demo.process.returncode == 0, said
    assert sum(line.startswith("ok ") for line in said.splitlines()) == PROMISES, said
    for phrase in ("before", "during", "after", "train tok/s", "ITL p99", "loss fell", "base beside adapter"):
        assert phrase in said
    assert demo.left_behind() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_demo_leaves_nothing_behind(demo: Demo, number: int, code: int) -> None:
    assert demo.process.stdout is not None
    for line in demo.process.stdout:
        if line.startswith("server ready"):
            break
    assert demo.left_behind() != []
    demo.process.send_signal(number)
    demo.process.communicate(timeout=60)
    assert demo.process.returncode == code
    assert demo.left_behind() == []
