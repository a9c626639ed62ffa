"""Jobs that wait for their place, in the order of their coming."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from coserve.errors import CoserveError, FailedPrecondition
from coserve.training.job import JobSpec
from coserve.training.job_listener import JobListener
from coserve.training.job_places import JobPlaces, Lack


class PendingJobs:
    """`places` are what they wait for; the `listener` is told of it, once for each kind of reason."""

    def __init__(self, places: JobPlaces, listener: JobListener) -> None:
        self._places = places
        self._listener = listener
        self._specs: dict[str, JobSpec] = {}
        self._told: dict[str, str] = {}  # what each was told that it waits for

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._specs

    def add(self, spec: JobSpec) -> None:
        """A job comes last."""
        self._specs[spec.job_id] = spec
        if spec.paused:
            self._listener.status(spec.job_id, "paused")

    def control(self, job_id: str, action: str) -> None:
        """Pause, resume or cancel one of them; FailedPrecondition where its state forbids it."""
        if action == "cancel":
            self._forget(job_id)
            self._listener.status(job_id, "cancelled")
            return
        paused = action == "pause"
        if self._specs[job_id].paused == paused:
            raise FailedPrecondition(f"job {job_id} can't {action} in its state", param="job_id")
        self._specs[job_id] = replace(self._specs[job_id], paused=paused)
        self._told.pop(job_id, None)
        self._listener.status(job_id, "paused" if paused else "queued")

    def ready(self) -> Iterator[JobSpec]:
        """Those that have their place now; they wait no longer. Who waits for others to end keeps those
        behind waiting too; who would wait for ever doesn't."""
        for spec in [spec for spec in self._specs.values() if not spec.paused]:
            try:
                lack = self._places.take(spec)
            except CoserveError as error:
                self._forget(spec.job_id)
                self._listener.status(spec.job_id, "failed", error)
                continue
            if lack is None:
                self._forget(spec.job_id)
                yield spec
                continue
            self._tell(spec.job_id, lack)
            if lack.passes:
                return

    def _tell(self, job_id: str, lack: Lack) -> None:
        if self._told.get(job_id) != lack.kind:
            self._told[job_id] = lack.kind
            self._listener.waits(job_id, lack.reason)

    def _forget(self, job_id: str) -> None:
        del self._specs[job_id]
        self._places.forget(job_id)
        self._told.pop(job_id, None)
