"""Which jobs an engine had in hand when it died, and how often that got a job nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FATAL_DEATHS = 3


@dataclass(frozen=True)
class _Row:
    """Deaths in a row with a job in hand and its last committed step still `step`."""

    deaths: int
    step: int


class EngineDeaths:
    """Counts for each job by itself. A job that commits a step between two deaths, or that the engine didn't
    have in hand at one, begins again. `submitting` is the job whose submission the engine hasn't answered,
    empty for none."""

    def __init__(self) -> None:
        self.submitting = ""
        self._training: set[str] = set()
        self._rows: dict[str, _Row] = {}

    def report(self, job_id: str, status: str) -> None:
        """The engine says that the job has this status."""
        if status == "running":
            self._training.add(job_id)
        else:
            self._training.discard(job_id)

    def take_in_hand(self) -> set[str]:
        """Ids of the jobs that the dead engine trained or was taking on; its successor has none yet."""
        found = (self._training | {self.submitting}) - {""}
        self._training, self.submitting = set(), ""
        return found

    def count(self, steps: Mapping[str, int]) -> list[str]:
        """Count one death for the jobs in hand that aren't over, given the last committed step of each.

        Returns the ids of those for which it was the `FATAL_DEATHS`th in a row.
        """
        rows = {}
        for job_id, step in steps.items():
            before = self._rows.get(job_id)
            stuck = before.deaths if before is not None and step <= before.step else 0
            rows[job_id] = _Row(stuck + 1, step)
        self._rows = {job_id: row for job_id, row in rows.items() if row.deaths < FATAL_DEATHS}
        return [job_id for job_id in rows if job_id not in self._rows]
