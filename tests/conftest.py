"""Where the benches' programs are found, and what every run says at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests import shared_data

# The programs of bench/ import one another by bare names, as they do when run.
sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing = shared_data.stood_in
    if missing:
        names = ", ".join(sorted(set(missing)))
        terminalreporter.write_line(
            f"{len(missing)} checks ran on stand-ins, for want of shared data: {names}"
        )
