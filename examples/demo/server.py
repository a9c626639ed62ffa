"""A `coserve serve` of our own: started on free ports with a state directory that goes away with it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 40.0
_READY = re.compile(r"^coserve ready http=(\S+) grpc=(\S+) model=(\S+)$")


@dataclass(frozen=True)
class Address:
    """What the server's ready line says."""

    http: str
    grpc: str
    model: str


def parse_ready(line: str) -> Address | None:
    """The addresses in the line that `coserve serve` prints when it is ready; None for any other line."""
    match = _READY.match(line.strip())
    return Address(*match.groups()) if match else None


@contextlib.contextmanager
def running(*flags: str) -> Iterator[Address]:
    """Start a server, give its addresses once it is ready, and end it on every way out of the block."""
    with tempfile.TemporaryDirectory(prefix="coserve-demo-") as folder:
        errors = Path(folder, "server.err")
        command = [sys.executable, "-m", "coserve.cli.main", "serve", "--port", "0", "--grpc-port", "0"]
        command += ["--state-dir", str(Path(folder, "state")), *flags]
        with errors.open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _wait_until_ready(process, errors)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[str], errors: Path) -> Address:
    assert process.stdout is not None
    for line in process.stdout:  # ends when the server does
        address = parse_ready(line)
        if address:
            return address
    said = errors.read_text(errors="replace").strip().splitlines()[-5:]
    raise RuntimeError("the server ended before it was ready: " + " | ".join(said))


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
