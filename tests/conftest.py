"""What every run says at its end."""

from __future__ import annotations

from typing import Any

from tests import shared_data


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing = shared_data.stood_in
    if missing:
        names = ", ".join(sorted(set(missing)))
        terminalreporter.write_line(
            f"{len(missing)} checks ran on stand-ins, for want of shared data: {names}"
        )
