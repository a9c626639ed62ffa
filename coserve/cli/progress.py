"""Following a job: a live line with bar, loss and tokens/s on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RECONNECT_SECONDS = 30.0
ENDED = ("succeeded", "failed", "cancelled")


class JobView:
    """Shows the events of one job. Use as a context manager; `show` each event in its order."""

    def __init__(self, name: str, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tok/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=None, loss="-", rate="-")

    def __enter__(self) -> JobView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Any) -> None:
        """One JobEvent of any type."""
        if event.type == "metrics":
            self._metrics(event)
        elif event.type == "status":
            self._say(f"{event.status}" + (f": {event.message}" if event.message else ""))
        elif event.message:
            self._say(event.message)

    def _metrics(self, event: Any) -> None:
        rate = f"{event.tokens_per_second:.0f}"
        if self._console.is_terminal:
            self._progress.update(
                self._task, completed=event.step, total=event.total_steps, loss=f"{event.loss:.4f}", rate=rate
            )
        else:
            self._say(f"step {event.step}/{event.total_steps} loss {event.loss:.4f} {rate} tok/s")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def events(stub: Any, request_type: Any, job_id: str, metadata: list[tuple[str, str]]) -> Iterator[Any]:
    """The job's events from its first, picked up again where they ended when the server goes away."""
    import time

    import grpc

    last, lost_at = "", 0.0
    while True:
        try:
            for event in stub.WatchJob(request_type(job_id=job_id, after=last), metadata=metadata):
                last, lost_at = event.id, 0.0
                yield event
                if event.type == "status" and event.status in ENDED:
                    return
            return
        except grpc.RpcError as error:
            now = time.monotonic()
            lost_at = lost_at or now
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
            if not gone or not last or now - lost_at > RECONNECT_SECONDS:
                raise
            time.sleep(0.5)


@contextlib.contextmanager
def going_on(hint: str, console: Console) -> Iterator[None]:
    """On Ctrl-C say that the job goes on without us and how to come back to it."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(hint, markup=False, highlight=False, soft_wrap=True)
        raise
