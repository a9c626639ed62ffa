"""What the engine reports of its jobs: steps, checkpoints, ends; and publication of what succeeded.

What the engine reports twice (after a restart) changes nothing the second time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from sqlite3 import Connection

from coserve.engine.client import JobEvent
from coserve.engine.messages import AdapterRef, JobCheckpoint, JobMessage, JobProgress, JobStatus
from coserve.errors import CoserveError, FailedPrecondition, Unavailable
from coserve.log import line
from coserve.lora.peft_files import read_adapter_info
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.server import adapter_store, job_store
from coserve.server.application import job_changes, job_data
from coserve.server.application.adapters import Adapters
from coserve.server.application.engine_deaths import EngineDeaths
from coserve.server.application.files import RESULTS, Files
from coserve.server.application.job_records import JobRecords
from coserve.server.application.publish_checks import PublishChecks
from coserve.server.application.publish_gate import refusal
from coserve.server.database import Database
from coserve.server.job_store import CheckpointRow, CheckResult, JobError, JobRecord
from coserve.server.state_dir import StateDir

logger = logging.getLogger(__name__)


class JobReports:
    """Takes the engine's reports into the records, and publishes the adapters of jobs that succeed."""

    def __init__(
        self,
        *,
        records: JobRecords,
        deaths: EngineDeaths,
        model_config: ModelConfig,
        database: Database,
        files: Files,
        adapters: Adapters,
        checks: PublishChecks,
        state: StateDir,
        metrics: Metrics,
        max_rank: int,
    ) -> None:
        self._records = records
        self._deaths = deaths
        self._model_config = model_config
        self._database = database
        self._files = files
        self._adapters = adapters
        self._checks = checks
        self._state = state
        self._checking: dict[str, asyncio.Task[None]] = {}
        self._metrics = metrics
        self._max_rank = max_rank

    async def restore(self) -> None:
        """At a start, before reports come: let checkpoints answer by their names again."""
        for checkpoint in await self._database.run(job_store.checkpoints):
            if Path(checkpoint.path).is_dir():
                await self._name_checkpoint(await self._records.get(checkpoint.job_id, None), checkpoint)
        await self._records.count()

    async def take(self, event: JobEvent) -> None:
        """Take one report of the engine; they come in order."""
        if isinstance(event, JobProgress):
            await self._on_progress(event)
        elif isinstance(event, JobCheckpoint):
            await self._on_checkpoint(event)
        elif isinstance(event, JobMessage):
            await self._on_message(event)
        else:
            await self._on_status(event)

    async def _on_progress(self, progress: JobProgress) -> None:
        metrics = progress.metrics
        event = job_changes.step_event(progress.job_id, metrics)

        def record(db: Connection) -> bool:
            job = job_store.get(db, progress.job_id)
            if job is None or job.is_over:
                return False
            known = job_store.metrics_event(db, progress.job_id, metrics.step)
            if known is not None:
                if not job_changes.same_step(known, event):
                    warning = f"Step {metrics.step} came out differently when it was replayed."
                    job_store.add_event(db, job_changes.event_of(job, "message", warning, level="warn"))
                return False
            job_store.add_event(db, event)
            job_store.save(db, job_changes.progressed(job, event))
            return True

        self._deaths.progressed(progress.job_id, metrics.step)
        if await self._database.run(record):
            self._metrics.finetune_step(metrics.trained_tokens, metrics.shared_tokens)
        self._records.changes.notify(progress.job_id)

    async def _on_checkpoint(self, event: JobCheckpoint) -> None:
        job = await self._records.get(event.job_id, None)
        checkpoint = CheckpointRow(
            id=f"ftckpt-{job.id.removeprefix('ftjob-')}-{event.step}",
            job_id=job.id,
            step=event.step,
            path=event.path,
            train_loss=event.train_loss,
            created_at=int(time.time()),
        )

        def record(db: Connection) -> Sequence[CheckpointRow]:
            if job_store.add_checkpoint(db, checkpoint):
                text = f"Checkpoint created at step {event.step}"
                noted = job_changes.event_of(
                    job, "checkpoint", text, step=event.step, checkpoint=checkpoint.id
                )
                job_store.add_event(db, noted)
            old = [row for row in job_store.checkpoints(db, job.id) if row.step not in event.kept]
            for row in old:
                job_store.drop_checkpoint(db, row.id)
            return old

        old = await self._database.run(record)
        await self._name_checkpoint(job, checkpoint)
        for row in old:
            await self._adapters.drop_checkpoint(job_changes.checkpoint_names(job, row))
            await asyncio.to_thread(job_data.remove, Path(row.path))
        self._records.changes.notify(job.id)

    async def _name_checkpoint(self, job: JobRecord, checkpoint: CheckpointRow) -> None:
        try:
            info = await asyncio.to_thread(
                read_adapter_info, checkpoint.path, self._model_config, self._max_rank
            )
        except CoserveError as error:
            logger.warning(line("checkpoint can't be served", id=checkpoint.id, reason=error.message))
            return
        reference = AdapterRef(checkpoint.id, checkpoint.step, info.digest, checkpoint.path)
        names = job_changes.checkpoint_names(job, checkpoint)
        self._adapters.add_checkpoint(names, reference, job.publish_as)

    async def _on_message(self, event: JobMessage) -> None:
        def record(db: Connection) -> None:
            job = job_store.get(db, event.job_id)
            # What a restarted engine says again is in the log.
            if job is not None and not job.is_over and not job_store.has_message(db, job.id, event.text):
                job_store.add_event(db, job_changes.event_of(job, "message", event.text, level=event.level))

        await self._database.run(record)
        self._records.changes.notify(event.job_id)

    async def _on_status(self, event: JobStatus) -> None:
        self._deaths.report(event.job_id, event.status)
        job = await self._records.get(event.job_id, None)
        if event.status == "succeeded":
            await self.publish(job, event.result_path)
        elif event.status == "failed":
            error = JobError(event.error_code or "internal_error", event.message, event.error_param)
            await self._records.update(job.id, lambda now: job_changes.failed(now, error))
        elif event.status == "queued" and event.message:
            await self._records.update(job.id, lambda now: job_changes.waiting(now, event.message))
        else:
            await self._records.update(job.id, lambda now: job_changes.moved(now, event.status))
        logger.info(line("job status", id=job.id, status=event.status))

    def is_checking(self, job_id: str) -> bool:
        """Whether a job has trained and its adapter is being checked."""
        return job_id in self._checking

    def stop_checking(self, job_id: str) -> None:
        """Leave off checking a job's adapter; it isn't published."""
        task = self._checking.pop(job_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Leave off checking; the next start begins again."""
        tasks = [*self._checking.values()]
        for job_id in [*self._checking]:
            self.stop_checking(job_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def publish(self, job: JobRecord, path: str = "") -> None:
        """Publish the checkpoint at `path` (once) if it meets the job's `publish_if`, then say so.

        Questions are asked in the background: other reports wait for this one to be taken.
        """
        if job.publish_if is None or not job.publish_if.checks:
            await self._publish(job, path)
            return
        self.stop_checking(job.id)
        task = asyncio.create_task(self._publish(job, path))
        self._checking[job.id] = task
        task.add_done_callback(lambda done: self._checked(job.id, done))

    def _checked(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._checking.get(job_id) is task:
            del self._checking[job_id]
        if not task.cancelled() and task.exception() is not None:
            logger.error("an adapter could not be published", exc_info=task.exception())

    async def _check(self, job: JobRecord, path: str) -> None:
        """Raise FailedPrecondition where the adapter at `path` doesn't meet the job's `publish_if`."""
        gate = job.publish_if
        if gate is None:
            return
        results: list[CheckResult] = []
        if gate.checks:
            info = await asyncio.to_thread(
                read_adapter_info, path, self._model_config, self._max_rank
            )
            adapter = AdapterRef(job.id, job.step, info.digest, path)
            results = await self._checks.run(gate, self._state.job(job.id), adapter)
            await self._records.update(job.id, lambda now: job_changes.checked(now, results))
        scored = [event for event in await self._records.events(job.id) if event.valid_loss is not None]
        loss, accuracy = (scored[-1].valid_loss, scored[-1].valid_accuracy) if scored else (None, None)
        error = refusal(gate, loss, accuracy, results)
        if error is not None:
            raise error

    async def _publish(self, job: JobRecord, path: str) -> None:
        if job.is_over:
            return
        try:
            row = await self._database.run(lambda db: adapter_store.of_job(db, job.id))
            if row is None:
                if not path:
                    raise FailedPrecondition("The job ended without a checkpoint.")
                await self._check(job, path)
                row = await self._adapters.publish(
                    job.publish_as, Path(path), job_id=job.id, origin="job"
                )
            results = await self._results(job)
            await self._records.update(
                job.id, lambda now: job_changes.success(now, row.version.name, results)
            )
        except Unavailable:
            # The engine died in between: the job is published when it is back (`resume_all`).
            logger.warning(line("publication waits for the engine", id=job.id))
        except CoserveError as error:
            await self._records.fail(job.id, error)

    async def _results(self, job: JobRecord) -> list[str]:
        if job.result_files:
            return job.result_files
        data = job_data.results_csv(await self._records.events(job.id))
        file = await self._files.add_bytes(data, f"step_metrics_{job.id}.csv", RESULTS, job.tenant)
        return [file.id]
