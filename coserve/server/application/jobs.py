"""Fine-tuning jobs: created, prepared, handed to the engine, followed, published.

Every change of a job is one transaction that reads its record, writes the next one and appends the events
that say so; what the engine reports twice (after a restart) changes nothing the second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from coserve.engine.client import EngineClient
from coserve.engine.messages import AdapterRef, JobCheckpoint, JobProgress, JobStatus
from coserve.errors import Conflict, CoserveError, FailedPrecondition, InvalidRequest, NotFound, Unavailable
from coserve.log import line
from coserve.lora.peft_files import read_adapter_info
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.server import adapter_store, job_store
from coserve.server.application import job_changes, job_data
from coserve.server.application.adapters import Adapters
from coserve.server.application.files import RESULTS, Files
from coserve.server.application.job_events import Changes
from coserve.server.application.job_factory import JobFactory
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import BaseModel
from coserve.server.database import Database
from coserve.server.errors import internal_error
from coserve.server.job_store import CheckpointRow, JobError, JobEvent, JobRecord
from coserve.server.state_dir import StateDir
from coserve.tokenizer import Tokenizer
from coserve.training.job import JobSpec

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 3
_CONTROL_WAIT = 10.0  # seconds for the engine's status to follow its reply
Update = Callable[[JobRecord], tuple[JobRecord, Sequence[JobEvent]]]


class Jobs:
    """The jobs of one server."""

    def __init__(
        self,
        *,
        base: BaseModel,
        model_config: ModelConfig,
        engine: EngineClient,
        tokenizer: Tokenizer,
        database: Database,
        state: StateDir,
        files: Files,
        adapters: Adapters,
        lifecycle: Lifecycle,
        metrics: Metrics,
        max_rank: int,
    ) -> None:
        self._base = base
        self._model_config = model_config
        self._engine = engine
        self._tokenizer = tokenizer
        self._database = database
        self._state = state
        self._files = files
        self._adapters = adapters
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_rank = max_rank
        self._factory = JobFactory(base, model_config, state, files, adapters, max_rank)
        self._changes = Changes()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._submitted: set[str] = set()

    # ------------------------------------------------------------------ reading

    async def get(self, job_id: str) -> JobRecord:
        """A job by id; NotFound."""
        job = await self._database.run(lambda db: job_store.get(db, job_id))
        if job is None:
            raise NotFound(
                f"There is no fine-tuning job {job_id[:100]!r}.", param="job_id", code="job_not_found"
            )
        return job

    async def list(self, metadata: dict[str, str] | None = None) -> list[JobRecord]:
        """All jobs, newest first, with these metadata pairs."""
        wanted = (metadata or {}).items()
        found = await self._database.run(job_store.all_jobs)
        return [job for job in found if wanted <= job.metadata.items()]

    async def checkpoints(self, job_id: str) -> Sequence[CheckpointRow]:
        """A job's checkpoints, newest first."""
        await self.get(job_id)
        return await self._database.run(lambda db: job_store.checkpoints(db, job_id))

    async def events(self, job_id: str) -> list[JobEvent]:
        """A job's events, oldest first."""
        await self.get(job_id)
        return await self._database.run(lambda db: job_store.events_after(db, job_id, 0))

    async def watch(self, job_id: str, after: str = "") -> AsyncIterator[JobEvent]:
        """A job's events from the start (or after one) as they come, until its terminal status.

        Raises NotFound, InvalidRequest for an unknown `after`, Unavailable when the server stops.
        """
        job = await self.get(job_id)
        seq = await self._seq_of(job_id, after)
        stopped = asyncio.ensure_future(self._lifecycle.stopped.wait())
        try:
            while True:
                news = self._changes.next(job_id)
                try:
                    job = await self.get(job_id)
                    for event in await self._events_after(job_id, seq):
                        seq = event.seq
                        yield event
                    if job.is_over:
                        return
                    await asyncio.wait({news, stopped}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._changes.forget(job_id, news)
                if stopped.done():
                    raise Unavailable("The server is shutting down; watch again from the last event.")
        finally:
            stopped.cancel()

    async def _events_after(self, job_id: str, seq: int) -> list[JobEvent]:
        return await self._database.run(lambda db: job_store.events_after(db, job_id, seq))

    async def _seq_of(self, job_id: str, event_id: str) -> int:
        if not event_id:
            return 0
        for event in await self.events(job_id):
            if event.id == event_id:
                return event.seq
        raise InvalidRequest(f"after names no event of this job: {event_id[:100]!r}.", param="after")

    # ------------------------------------------------------------------ creating

    async def create(self, body: object) -> JobRecord:
        """Check a request, note the job, and begin to prepare it.

        Raises InvalidRequest, NotFound (file or adapter), Conflict (idempotency key used otherwise).
        """
        self._lifecycle.check_open()
        job = await self._factory.make(body)
        created = job_changes.event_of(job, "message", "Created fine-tuning job: " + job.id)
        status = job_changes.status_event(job)

        def insert(db: Connection) -> JobRecord:
            known = job_store.by_key(db, job.idempotency_key) if job.idempotency_key else None
            if known is not None:
                return known
            job_store.insert(db, job)
            job_store.add_event(db, created)
            job_store.add_event(db, status)
            return job

        noted = await self._database.run(insert)
        if noted is not job:
            await asyncio.to_thread(job_data.remove, self._state.job(job.id))
            if noted.request_digest != job.request_digest:
                raise Conflict("This idempotency key was used with another request.", param="idempotency_key")
            return noted
        await self._count()
        logger.info(line("job created", id=job.id, file=job.training_file, rank=job.lora.r))
        self._prepare_soon(job)
        return job

    # ------------------------------------------------------------------ preparing and submitting

    def _prepare_soon(self, job: JobRecord) -> None:
        task = asyncio.create_task(self._prepare(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda done: self._tasks.pop(job.id, None))

    async def _prepare(self, job: JobRecord) -> None:
        """Tokenise the training file and submit the job; a bad file fails it."""
        folder = self._state.job(job.id)
        try:
            if not (folder / "data").is_dir():
                await self._files.get(job.training_file, param="training_file")
                prepared = await job_data.prepare(
                    self._files.path(job.training_file),
                    folder / "data",
                    self._tokenizer,
                    job.training.max_length,
                )
                total = job_data.total_steps(prepared.examples, job.training)
                await self._update(job.id, lambda now: job_changes.after_validation(now, prepared, total))
            await self._submit(job.id)
        except asyncio.CancelledError:
            raise
        except CoserveError as error:
            await self._fail(job.id, error)
        except Exception:
            logger.exception("a job could not be prepared")
            await self._fail(job.id, internal_error())

    async def _submit(self, job_id: str) -> None:
        job = await self.get(job_id)
        if job.is_over or job_id in self._submitted:
            return
        folder = self._state.job(job_id)
        spec = JobSpec(
            job_id=job_id,
            data_path=str(folder / "data"),
            checkpoint_dir=str(folder / "checkpoints"),
            seed=job.seed,
            lora=job.lora,
            training=job.training,
            base_model_name=self._base.name,
            init_path=str(folder / "init") if job.init_from else None,
            priority=job.priority,
            paused=job.status == "paused",
        )
        (folder / "checkpoints").mkdir(exist_ok=True)
        self._submitted.add(job_id)
        try:
            await self._engine.submit_job(spec)
        except Unavailable:
            self._submitted.discard(job_id)
        except CoserveError:
            self._submitted.discard(job_id)
            raise

    async def resume_all(self) -> None:
        """After a start of the server or of the engine: bring every unfinished job on its way again."""
        self._submitted.clear()
        for job in reversed(await self.list()):
            if job.is_over or job.id in self._tasks:
                continue
            published = await self._database.run(lambda db, job_id=job.id: adapter_store.of_job(db, job_id))
            if published is not None:
                await self._succeeded(job)
            else:
                self._prepare_soon(job)
        await self._count()

    async def restore(self) -> None:
        """Before the engine starts: let checkpoints answer by their names again."""
        for checkpoint in await self._database.run(job_store.checkpoints):
            if Path(checkpoint.path).is_dir():
                await self._name_checkpoint(await self.get(checkpoint.job_id), checkpoint)
        await self._count()

    async def close(self) -> None:
        """Stop preparing; what is unfinished begins again at the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------ controlling

    async def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job; FailedPrecondition when it is over."""
        return await self._control(job_id, "cancel", "cancelled", frozenset({"cancelled"}))

    async def pause(self, job_id: str) -> JobRecord:
        """Pause a job; FailedPrecondition when it is over."""
        return await self._control(job_id, "pause", "paused", frozenset({"paused"}))

    async def resume(self, job_id: str) -> JobRecord:
        """Let a paused job go on; FailedPrecondition when it is over."""
        going = frozenset({"running", "queued", "validating_files"})
        return await self._control(job_id, "resume", "queued", going)

    async def _control(self, job_id: str, action: str, status: str, reached: frozenset[str]) -> JobRecord:
        job = await self.get(job_id)
        if job.status in reached and action != "cancel":
            return job
        if job.is_over:
            raise FailedPrecondition(
                f"The job is over ({job.status}); there is nothing to {action}.", param="job_id"
            )
        if job_id not in self._submitted:
            return await self._update(job_id, lambda now: job_changes.moved(now, status))
        await self._engine.control_job(job_id, action)
        deadline = asyncio.get_running_loop().time() + _CONTROL_WAIT
        while job.status not in reached and not job.is_over:
            news = self._changes.next(job_id)
            job = await self.get(job_id)
            left = deadline - asyncio.get_running_loop().time()
            if job.status in reached or job.is_over or left <= 0.0:
                self._changes.forget(job_id, news)
                break
            await asyncio.wait({news}, timeout=left)
            self._changes.forget(job_id, news)
        return job

    async def publish_checkpoint(self, checkpoint_id: str, name: str) -> Any:
        """Make a checkpoint a version of `name` (empty: the name the job publishes under)."""
        checkpoint = await self._database.run(lambda db: job_store.checkpoint(db, checkpoint_id))
        if checkpoint is None:
            raise NotFound(f"There is no checkpoint {checkpoint_id[:100]!r}.", param="checkpoint")
        job = await self.get(checkpoint.job_id)
        name = name or job.publish_as
        self._adapters.check_name(name, "name")
        return await self._adapters.publish(name, Path(checkpoint.path), job_id=job.id)

    # ------------------------------------------------------------------ what the engine reports

    async def on_event(self, event: JobProgress | JobCheckpoint | JobStatus) -> None:
        """Take one report of the engine; they come in order."""
        if isinstance(event, JobProgress):
            await self._on_progress(event)
        elif isinstance(event, JobCheckpoint):
            await self._on_checkpoint(event)
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

        if await self._database.run(record):
            self._metrics.finetune_step(metrics.trained_tokens)
        self._changes.notify(progress.job_id)

    async def _on_checkpoint(self, event: JobCheckpoint) -> None:
        job = await self.get(event.job_id)
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
            old = job_store.checkpoints(db, job.id)[KEPT_CHECKPOINTS:]
            for row in old:
                job_store.drop_checkpoint(db, row.id)
            return old

        old = await self._database.run(record)
        await self._name_checkpoint(job, checkpoint)
        for row in old:
            await self._adapters.drop_checkpoint(job_changes.checkpoint_names(job, row))
            await asyncio.to_thread(job_data.remove, Path(row.path))
        self._changes.notify(job.id)

    async def _name_checkpoint(self, job: JobRecord, checkpoint: CheckpointRow) -> None:
        try:
            info = await asyncio.to_thread(
                read_adapter_info, checkpoint.path, self._model_config, self._max_rank
            )
        except CoserveError as error:
            logger.warning(line("checkpoint can't be served", id=checkpoint.id, reason=error.message))
            return
        reference = AdapterRef(checkpoint.id, checkpoint.step, info.digest, checkpoint.path)
        self._adapters.add_checkpoint(job_changes.checkpoint_names(job, checkpoint), reference)

    async def _on_status(self, event: JobStatus) -> None:
        job = await self.get(event.job_id)
        if event.status == "succeeded":
            await self._succeeded(job)
        elif event.status == "failed":
            error = JobError(event.error_code or "internal_error", event.message, event.error_param)
            await self._update(job.id, lambda now: job_changes.failed(now, error))
        else:
            await self._update(job.id, lambda now: job_changes.moved(now, event.status))
        logger.info(line("job status", id=job.id, status=event.status))

    async def _succeeded(self, job: JobRecord) -> None:
        """Publish the final checkpoint (once), then say so."""
        if job.is_over:
            return
        try:
            row = await self._database.run(lambda db: adapter_store.of_job(db, job.id))
            if row is None:
                newest = await self._database.run(lambda db: job_store.checkpoints(db, job.id))
                if not newest:
                    raise FailedPrecondition("The job ended without a checkpoint.")
                row = await self._adapters.publish(
                    job.publish_as, Path(newest[0].path), job_id=job.id, origin="job"
                )
            results = await self._results(job)
            await self._update(job.id, lambda now: job_changes.success(now, row.version.name, results))
        except Unavailable:
            # The engine died in between: the job is published when it is back (`resume_all`).
            logger.warning(line("publication waits for the engine", id=job.id))
        except CoserveError as error:
            await self._fail(job.id, error)

    async def _results(self, job: JobRecord) -> list[str]:
        if job.result_files:
            return job.result_files
        data = job_data.results_csv(await self.events(job.id))
        file = await self._files.add_bytes(data, f"step_metrics_{job.id}.csv", RESULTS)
        return [file.id]

    # ------------------------------------------------------------------ changing

    async def _fail(self, job_id: str, error: CoserveError) -> None:
        failure = JobError(error.code, error.message, error.param)
        await self._update(job_id, lambda now: job_changes.failed(now, failure))

    async def _update(self, job_id: str, update: Update) -> JobRecord:
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
            self._submitted.discard(job_id)
            with contextlib.suppress(KeyError):
                if self._tasks[job_id] is not asyncio.current_task():
                    self._tasks[job_id].cancel()
        self._changes.notify(job_id)
        await self._count()
        return job

    async def _count(self) -> None:
        self._metrics.jobs(await self._database.run(job_store.count_by_status))
