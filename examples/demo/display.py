"""What is shown while the demo runs: a live table on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live

from examples.demo.figures import PHASES, Figures, Training, figures, line, phase_table
from examples.demo.load import Clients

LINE_SECONDS = 5.0
FRAME_SECONDS = 0.5


class Display:
    """Knows the phases' start and end and shows their figures as they grow."""

    def __init__(self, console: Console, clients: Clients, training: Training) -> None:
        self._console = console
        self._clients = clients
        self._training = training
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def phase(self, name: str, title: str) -> AsyncIterator[None]:
        """Mark the answers that begin in this block as `name` and show them meanwhile."""
        self._console.print(f"\n{title}", highlight=False)
        self._began[name] = time.monotonic()
        self._clients.phase = name
        shower = asyncio.create_task(self._live() if self._console.is_terminal else self._lines(name))
        try:
            yield
        finally:
            self._ended[name] = time.monotonic()
            shower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await shower

    def rows(self) -> list[Figures]:
        """The figures of every phase that has begun."""
        now = time.monotonic()
        return [
            figures(name, self._clients.answers, self._ended.get(name, now) - self._began[name])
            for name in PHASES
            if name in self._began
        ]

    async def _live(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(phase_table(self.rows(), self._training), refresh=True)
                await asyncio.sleep(FRAME_SECONDS)

    async def _lines(self, name: str) -> None:
        while True:
            await asyncio.sleep(LINE_SECONDS)
            row = next(row for row in self.rows() if row.phase == name)
            self._console.print(line(row, self._training), highlight=False, markup=False, soft_wrap=True)
