"""Who hears of the jobs' news."""

from __future__ import annotations

from typing import Protocol

from coserve.errors import CoserveError
from coserve.training.job import StepMetrics


class JobListener(Protocol):
    """What jobs tell; the engine makes messages of it."""

    def progress(self, job_id: str, metrics: StepMetrics) -> None:
        """An optimizer step was committed (or is told again after a restart)."""

    def checkpoint(self, job_id: str, step: int, path: str, train_loss: float, kept: list[int]) -> None:
        """A checkpoint is on disk; those of the steps `kept` are all there are now."""

    def message(self, job_id: str, level: str, text: str) -> None:
        """Something to know about a job; `level` is "info" or "warn"."""

    def waits(self, job_id: str, reason: str) -> None:
        """A job can't start yet."""

    def status(
        self, job_id: str, status: str, error: CoserveError | None = None, result_path: str = ""
    ) -> None:
        """A job changed its state; one that succeeded ends with the checkpoint at `result_path`."""
