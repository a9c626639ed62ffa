"""Which job an engine dies of: those it had in hand are tried one at a time, and deaths are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

FATAL_DEATHS = 3


@dataclass(frozen=True)
class _Row:
    """Deaths in a row with a job alone in hand and its last committed step still `step`."""

    deaths: int
    step: int


class EngineDeaths:
    """A death with one job in hand counts for that job; one that commits a step between two deaths begins
    again. A death with several blames nobody: they become suspects, and the engines that follow get them one
    at a time, each until it has committed a new step, is paused or over. So the next death has one culprit,
    and no job fails beside a bad one. Jobs that come meanwhile wait their turn behind the suspects.

    `submitting` is the job whose submission the engine hasn't answered, empty for none. `released` is called
    with the id of a job that was held back and may go to the engine now.
    """

    def __init__(self, released: Callable[[str], None]) -> None:
        self.submitting = ""
        self._released = released
        self._training: set[str] = set()
        self._rows: dict[str, _Row] = {}
        self._suspects: dict[str, int] = {}  # id -> last committed step; the first is being tried

    def admits(self, job_id: str, step: int) -> bool:
        """Whether the job, whose last committed step is `step`, may go to the engine now."""
        if not self._suspects or next(iter(self._suspects)) == job_id:
            return True
        self._suspects.setdefault(job_id, step)
        return False

    def report(self, job_id: str, status: str) -> None:
        """The engine says that the job has this status."""
        if status == "running":
            self._training.add(job_id)
        else:
            self._training.discard(job_id)
            self.clear(job_id)

    def progressed(self, job_id: str, step: int) -> None:
        """The job has committed this step (or replayed it)."""
        if step > self._suspects.get(job_id, step):
            self.clear(job_id)

    def clear(self, job_id: str) -> None:
        """The job is no suspect any more."""
        tried = next(iter(self._suspects), "")
        self._suspects.pop(job_id, None)
        if job_id == tried and self._suspects:
            self._released(next(iter(self._suspects)))

    def take_in_hand(self) -> set[str]:
        """Ids of the jobs that the dead engine trained or was taking on; its successor has none yet."""
        found = (self._training | {self.submitting}) - {""}
        self._training, self.submitting = set(), ""
        return found

    def count(self, steps: Mapping[str, int]) -> list[str]:
        """Take note of one death, given the last committed step of each job in hand that isn't over.

        Returns the id of the job for which it was the `FATAL_DEATHS`th in a row, if there is one.
        """
        if len(steps) > 1:
            # The one that was let in last is the likeliest; it goes first, and now alone.
            tried = [job_id for job_id in list(self._suspects)[:1] if job_id in steps]
            first = {job_id: steps[job_id] for job_id in tried}
            self._suspects = first | dict(steps) | {**self._suspects, **steps}
            return []
        rows = {}
        for job_id, step in steps.items():
            before = self._rows.get(job_id)
            stuck = before.deaths if before is not None and step <= before.step else 0
            rows[job_id] = _Row(stuck + 1, step)
        given_up = [job_id for job_id, row in rows.items() if row.deaths >= FATAL_DEATHS]
        self._rows = {job_id: row for job_id, row in rows.items() if job_id not in given_up}
        return given_up
