"""Following a job: a live line with bar, losses, tokens/s and the time left on a terminal, one plain line a
step elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

RECONNECT_SECONDS = 30.0
PACE = 0.1  # weight of a new step's duration in the running mean
ENDED = ("succeeded", "failed", "cancelled")


class JobView:
    """Shows the events of one job. Use as a context manager; `show` each event in its order."""

    def __init__(self, name: str, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=None, news="")
        self._valid_loss: float | None = None
        self._seconds = 0.0

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
        news = self._news(event)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=event.step, total=event.total_steps, news=news)
        else:
            self._say(f"step {event.step}/{event.total_steps} {news}")

    def _news(self, event: Any) -> str:
        """Loss, the last validation loss, tokens/s, and how long the rest takes at the pace of late."""
        if event.HasField("valid_loss"):
            self._valid_loss = event.valid_loss
        self._seconds += (event.seconds - self._seconds) * (PACE if self._seconds else 1.0)
        words = [f"loss {event.loss:.4f}"]
        if self._valid_loss is not None:
            words.append(f"valid {self._valid_loss:.4f}")
        words.append(f"{event.tokens_per_second:.0f} tok/s")
        if event.step < event.total_steps:
            words.append(f"eta {duration(self._seconds * (event.total_steps - event.step))}")
        return " ".join(words)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
