"""The records of fine-tuning jobs: read, watched, and changed.

Every change of a job is one transaction that reads its record, writes the next one and appends the events
that say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from sqlite3 import Connection

from coserve.errors import AdapterNotLive, CoserveError, InvalidRequest, NotFound, Unavailable
from coserve.metrics import Metrics
from coserve.server import job_store
from coserve.server.application import job_changes
from coserve.server.application.job_events import Changes
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import unknown_model
from coserve.server.auth import Key, owns, sees
from coserve.server.database import Database
from coserve.server.job_store import CheckpointRow, JobError, JobEvent, JobRecord

Update = Callable[[JobRecord], tuple[JobRecord, Sequence[JobEvent]]]


class JobRecords:
    """What is known of the jobs of one server. `on_end` hears the id of each job that is found over.

    Who asks is a `key`: jobs of other tenants are unknown to it.
    """

    def __init__(
        self,
        database: Database,
        lifecycle: Lifecycle,
        metrics: Metrics,
        on_end: Callable[[str], None],
    ) -> None:
        self._database = database
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._on_end = on_end
        self.changes = Changes()

    # ------------------------------------------------------------------ reading

    async def get(self, job_id: str, key: Key | None) -> JobRecord:
        """A job by id; NotFound."""
        job = await self._database.run(lambda db: job_store.get(db, job_id))
        if job is None or not owns(key, job.tenant):
            raise NotFound(
                f"There is no fine-tuning job {job_id[:100]!r}.", param="job_id", code="job_not_found"
            )
        return job

    async def check_live(self, job_id: str, key: Key | None) -> None:
        """Whether a job's adapter can answer while it trains, as far as its record tells. As with other
        models, the names that `key` sees decide, not whose job it is.

        Raises ModelNotFound, or AdapterNotLive before the job's first step and after its end.
        """
        name = f"{job_id}:live"
        try:
            job = await self.get(job_id, None)
        except NotFound:
            raise unknown_model(name) from None
        if not sees(key, name, job.publish_as):
            raise unknown_model(name)
        if job.fine_tuned_model:
            reason = f"has succeeded; its adapter answers as {job.fine_tuned_model!r}"
        elif job.is_over:
            reason = f"is over ({job.status}); its checkpoints answer by their ids"
        elif not job.step:
            reason = f"has not finished its first optimizer step (it is {job.status})"
        else:
            return
        raise AdapterNotLive(f"Job {job_id} {reason}.", param="model")

    async def list(self, key: Key | None, metadata: dict[str, str] | None = None) -> list[JobRecord]:
        """All jobs, newest first, with these metadata pairs."""
        wanted = (metadata or {}).items()
        found = await self._database.run(job_store.all_jobs)
        return [job for job in found if owns(key, job.tenant) and wanted <= job.metadata.items()]

    async def checkpoints(self, job_id: str, key: Key | None) -> Sequence[CheckpointRow]:
        """A job's checkpoints, newest first."""
        await self.get(job_id, key)
        return await self._database.run(lambda db: job_store.checkpoints(db, job_id))

    async def metrics_of(self, checkpoints: Sequence[CheckpointRow]) -> dict[str, JobEvent]:
        """The metrics event of each checkpoint's step, by the checkpoint's id."""

        def read(db: Connection) -> dict[str, JobEvent]:
            found = {row.id: job_store.metrics_event(db, row.job_id, row.step) for row in checkpoints}
            return {name: event for name, event in found.items() if event is not None}

        return await self._database.run(read)

    async def events(self, job_id: str) -> list[JobEvent]:
        """A job's events, oldest first."""
        await self.get(job_id, None)
        return await self._database.run(lambda db: job_store.events_after(db, job_id, 0))

    async def newest_events(
        self, job_id: str, after: str | None, limit: int, key: Key | None
    ) -> tuple[list[JobEvent], bool]:
        """(a page of a job's events, newest first, whether older ones follow).

        Raises NotFound, InvalidRequest for an unknown `after`.
        """
        await self.get(job_id, key)
        before = None if after is None else await self._seq_of(job_id, after)
        found = await self._database.run(
            lambda db: job_store.newest_events(db, job_id, before, limit + 1)
        )
        return found[:limit], len(found) > limit

    async def watch(self, job_id: str, after: str, key: Key | None) -> AsyncIterator[JobEvent]:
        """A job's events from the start (or after one) as they come, until its terminal status.

        Raises NotFound, InvalidRequest for an unknown `after`, Unavailable when the server stops.
        """
        job = await self.get(job_id, key)
        seq = await self._seq_of(job_id, after) if after else 0
        stopped = asyncio.ensure_future(self._lifecycle.stopped.wait())
        try:
            while True:
                news = self.changes.next(job_id)
                try:
                    job = await self.get(job_id, key)
                    for event in await self._events_after(job_id, seq):
                        seq = event.seq
                        yield event
                    if job.is_over:
                        return
                    await asyncio.wait({news, stopped}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self.changes.forget(job_id, news)
                if stopped.done():
                    raise Unavailable("The server is shutting down; watch again from the last event.")
        finally:
            stopped.cancel()

    async def _events_after(self, job_id: str, seq: int) -> list[JobEvent]:
        return await self._database.run(lambda db: job_store.events_after(db, job_id, seq))

    async def _seq_of(self, job_id: str, event_id: str) -> int:
        seq = await self._database.run(lambda db: job_store.event_seq(db, job_id, event_id))
        if seq is None:
            raise InvalidRequest(f"after names no event of this job: {event_id[:100]!r}.", param="after")
        return seq

    # ------------------------------------------------------------------ changing

    async def fail(self, job_id: str, error: CoserveError) -> None:
        """End a job by an error."""
        failure = JobError(error.code, error.message, error.param)
        await self.update(job_id, lambda now: job_changes.failed(now, failure))

    async def update(self, job_id: str, update: Update) -> JobRecord:
        """One change of a job that isn't over: record and events together."""

        def record(db: Connection) -> JobRecord:
            job = job_store.get(db, job_id)
            if job is None:
                raise NotFound(f"There is no fine-tuning job {job_id[:100]!r}.", param="job_id")
            if job.is_over:
                return job
            after, events = update(job)
            job_store.save(db, after)
            for event in events:
                job_store.add_event(db, event)
            return after

        job = await self._database.run(record)
        if job.is_over:
            self._on_end(job_id)
        self.changes.notify(job_id)
        await self.count()
        return job

    async def count(self) -> None:
        """Bring the number of jobs in each status up to date in the metrics."""
        self._metrics.jobs(await self._database.run(job_store.count_by_status))
