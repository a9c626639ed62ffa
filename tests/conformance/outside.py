"""Clients that live apart, under build/clients: run as programs of their own against a live server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CLIENTS = HERE.parents[1] / "build" / "clients"
NODE, VENV = CLIENTS / "node", CLIENTS / "venv" / "bin" / "python"


def need(path: Path) -> None:
    """Skip where scripts/setup_clients.sh could not install a client."""
    if not path.exists():
        pytest.skip(f"{path.relative_to(CLIENTS.parent)} isn't there: run scripts/setup_clients.sh")


def outcomes(program: list[str], url: str, model: str, **environment: str) -> dict[str, Any]:
    """What a client's checks came to: it prints one JSON object, a check's name to its error or null."""
    ran = subprocess.run(
        program,
        env={**os.environ, "COSERVE_URL": url, "COSERVE_MODEL": model, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
