"""Fine-tuning jobs: created, prepared, handed to the engine, steered.

What is known of them lies in `job_records`; what the engine says of them arrives in `job_reports`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from coserve.engine.client import EngineClient
from coserve.errors import (
    Conflict,
    CoserveError,
    FailedPrecondition,
    InternalError,
    NotFound,
    RateLimited,
    Unavailable,
)
from coserve.log import line
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.server import adapter_store, job_store
from coserve.server.application import auto_settings, job_changes, job_data
from coserve.server.application.adapters import Adapters
from coserve.server.application.engine_deaths import FATAL_DEATHS, EngineDeaths
from coserve.server.application.files import Files
from coserve.server.application.job_factory import JobFactory
from coserve.server.application.job_records import JobRecords
from coserve.server.application.job_reports import JobReports
from coserve.server.application.lifecycle import Lifecycle
from coserve.server.application.models import BaseModel
from coserve.server.application.publish_checks import PublishChecks
from coserve.server.auth import Authenticator, Key
from coserve.server.database import Database
from coserve.server.errors import internal_error
from coserve.server.job_store import JobRecord
from coserve.server.state_dir import StateDir
from coserve.tokenizer import Tokenizer
from coserve.training.job import JobSpec

logger = logging.getLogger(__name__)

_JOB_RETRY = 60.0  # seconds; nobody knows when a job ends
_CONTROL_WAIT = 10.0  # seconds for the engine's status to follow its reply


class Jobs:
    """The jobs of one server. `records` reads and watches them, `reports` takes the engine's reports."""

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
        checks: PublishChecks,
        lifecycle: Lifecycle,
        metrics: Metrics,
        auth: Authenticator,
        max_rank: int,
    ) -> None:
        self._base = base
        self._auth = auth
        self._engine = engine
        self._tokenizer = tokenizer
        self._database = database
        self._state = state
        self.model_config = model_config
        self._files = files
        self._adapters = adapters
        self._lifecycle = lifecycle
        self._factory = JobFactory(
            base,
            model_config,
            state,
            files,
            adapters,
            checks,
            max_rank,
            memory=lambda: engine.info.job_memory_bytes if engine.info is not None else None,
        )
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._submitted: set[str] = set()
        self._submission = asyncio.Lock()  # one at a time, so that an engine that dies of one says which
        self._deaths = EngineDeaths(self._submit_later)
        self.records = JobRecords(database, lifecycle, metrics, self._ended)
        self.reports = JobReports(
            records=self.records,
            deaths=self._deaths,
            model_config=model_config,
            database=database,
            files=files,
            adapters=adapters,
            checks=checks,
            state=state,
            metrics=metrics,
            max_rank=max_rank,
        )

    # ------------------------------------------------------------------ creating

    async def create(self, body: object, key: Key | None = None) -> JobRecord:
        """Check a request, note the job as one of `key`'s, and begin to prepare it.

        Raises InvalidRequest, NotFound (file or adapter), Conflict (idempotency key used otherwise),
        PermissionDenied for a priority that the key may not have, and RateLimited when it has as many jobs as
        it may.
        """
        self._lifecycle.check_open()
        job = await self._factory.make(body, key)
        created = job_changes.event_of(job, "message", "Created fine-tuning job: " + job.id)
        status = job_changes.status_event(job)

        def insert(db: Connection) -> JobRecord:
            known = job_store.by_key(db, job) if job.idempotency_key else None
            if known is not None:
                return known
            if key is not None and 0 < key.max_jobs <= job_store.count_open(db, key.tenant):
                raise RateLimited(
                    f"This API key has {key.max_jobs} jobs that haven't ended, as many as it may; "
                    "cancel one, or wait.",
                    retry_after=_JOB_RETRY,
                    code="max_jobs_exceeded",
                )
            job_store.insert(db, job)
            job_store.add_event(db, created)
            job_store.add_event(db, status)
            return job

        try:
            noted = await self._database.run(insert)
        except RateLimited:
            await asyncio.to_thread(job_data.remove, self._state.job(job.id))
            raise
        if noted is not job:
            await asyncio.to_thread(job_data.remove, self._state.job(job.id))
            if noted.request_digest != job.request_digest:
                raise Conflict("This idempotency key was used with another request.", param="idempotency_key")
            return noted
        await self.records.count()
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
            # Data that a server had read when it ended, before it took note, is read again.
            if not job.total_steps or not (folder / "data").is_dir():
                sources = await self._sources(job)
                prepared = await job_data.prepare(
                    sources,
                    folder,
                    self._tokenizer,
                    job.training,
                    job.method,
                    job.seed,
                    self._base.vocab_size,
                )
                training = auto_settings.choose(
                    job.training, job.auto, prepared.examples, prepared.tokens, job.method
                )
                total = await asyncio.to_thread(
                    job_data.total_steps, folder / "data", training, job.seed
                )
                await self.records.update(
                    job.id, lambda now: job_changes.after_validation(now, prepared, training, total)
                )
            await self._submit(job.id)
        except asyncio.CancelledError:
            raise
        except CoserveError as error:
            await self.records.fail(job.id, error)
        except Exception:
            logger.exception("a job could not be prepared")
            await self.records.fail(job.id, internal_error())

    async def _sources(self, job: JobRecord) -> job_data.Sources:
        """The job's files; NotFound for one that was deleted meanwhile."""
        await self._files.get(job.training_file, None, "training_file")
        training = self._files.path(job.training_file)
        if not job.validation_file:
            return job_data.Sources(training)
        await self._files.get(job.validation_file, None, "validation_file")
        return job_data.Sources(training, self._files.path(job.validation_file))

    async def _submit(self, job_id: str) -> None:
        async with self._submission:
            job = await self.records.get(job_id, None)
            # Without an engine nothing is to be done: `resume_all` comes when it is back.
            if job.is_over or job_id in self._submitted or not self._engine.ready:
                return
            if not self._deaths.admits(job_id, job.step):
                return
            folder = self._state.job(job_id)
            (folder / "checkpoints").mkdir(exist_ok=True)
            validation = folder / "validation"
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
                tenant=job.tenant,
                share=self._auth.weight(job.tenant),
                paused=job.status == "paused",
                method=job.method,
                validation_path=str(validation) if validation.is_dir() else None,
            )
            await self._hand_over(spec)

    def _submit_later(self, job_id: str) -> None:
        """A job that was held back may go to the engine."""
        task = asyncio.create_task(self._prepare_again(job_id))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _prepare_again(self, job_id: str) -> None:
        job = await self.records.get(job_id, None)
        if job_id not in self._tasks:
            self._prepare_soon(job)

    async def _hand_over(self, spec: JobSpec) -> None:
        self._submitted.add(spec.job_id)
        self._deaths.submitting = spec.job_id
        try:
            await self._engine.submit_job(spec)
        except Unavailable:  # the engine died meanwhile, perhaps of this: `submitting` stays
            self._submitted.discard(spec.job_id)
        except CoserveError:
            self._submitted.discard(spec.job_id)
            self._deaths.submitting = ""
            raise
        else:
            self._deaths.submitting = ""

    async def engine_died(self) -> None:
        """Call first once the engine is back: forget what the dead one had, and fail jobs that it keeps dying
        of, so that the others can go on."""
        in_hand = self._deaths.take_in_hand()
        self._submitted.clear()
        jobs = {job.id: job for job in await self.records.list(None) if job.id in in_hand and not job.is_over}
        for job_id in self._deaths.count({job.id: job.step for job in jobs.values()}):
            step = jobs[job_id].step
            when = f"after step {step}" if step else "before its first step"
            reason = (
                f"The engine died {FATAL_DEATHS} times in a row on this job {when}; "
                "the engine's log has the reason."
            )
            logger.error(line("job given up", id=job_id, engine_deaths=FATAL_DEATHS, step=step))
            await self.records.fail(job_id, InternalError(reason, code="engine_died"))

    async def resume_all(self) -> None:
        """After a start of the server or of the engine: bring every unfinished job on its way again."""
        for job in reversed(await self.records.list(None)):
            if job.is_over or job.id in self._tasks:
                continue
            published = await self._database.run(lambda db, job_id=job.id: adapter_store.of_job(db, job_id))
            if published is not None:
                await self.reports.publish(job)
            else:
                self._prepare_soon(job)
        await self.records.count()

    async def close(self) -> None:
        """Stop preparing; what is unfinished begins again at the next start."""
        tasks = [*self._tasks.values(), *self._releases]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.reports.close()

    # ------------------------------------------------------------------ controlling

    async def cancel(self, job_id: str, key: Key | None) -> JobRecord:
        """Cancel a job; FailedPrecondition when it is over."""
        return await self._control(job_id, key, "cancel", "cancelled", frozenset({"cancelled"}))

    async def pause(self, job_id: str, key: Key | None) -> JobRecord:
        """Pause a job; FailedPrecondition when it is over."""
        return await self._control(job_id, key, "pause", "paused", frozenset({"paused"}))

    async def resume(self, job_id: str, key: Key | None) -> JobRecord:
        """Let a paused job go on; FailedPrecondition when it is over."""
        going = frozenset({"running", "queued", "validating_files"})
        return await self._control(job_id, key, "resume", "queued", going)

    async def _control(
        self, job_id: str, key: Key | None, action: str, status: str, reached: frozenset[str]
    ) -> JobRecord:
        job = await self.records.get(job_id, key)
        if job.status in reached and action != "cancel":
            return job
        if job.is_over:
            raise FailedPrecondition(
                f"The job is over ({job.status}); there is nothing to {action}.", param="job_id"
            )
        if self.reports.is_checking(job_id):
            if action != "cancel":
                raise FailedPrecondition(
                    "The job has trained; its adapter is being checked before it is published.",
                    param="job_id",
                )
            self.reports.stop_checking(job_id)
            return await self.records.update(job_id, lambda now: job_changes.moved(now, status))
        if job_id not in self._submitted:
            return await self.records.update(job_id, lambda now: job_changes.moved(now, status))
        await self._engine.control_job(job_id, action)
        deadline = asyncio.get_running_loop().time() + _CONTROL_WAIT
        while job.status not in reached and not job.is_over:
            news = self.records.changes.next(job_id)
            job = await self.records.get(job_id, key)
            left = deadline - asyncio.get_running_loop().time()
            if job.status in reached or job.is_over or left <= 0.0:
                self.records.changes.forget(job_id, news)
                break
            await asyncio.wait({news}, timeout=left)
            self.records.changes.forget(job_id, news)
        return job

    async def publish_checkpoint(self, checkpoint_id: str, name: str, key: Key | None) -> Any:
        """Make a checkpoint a version of `name` (empty: the name the job publishes under)."""
        checkpoint = await self._database.run(lambda db: job_store.checkpoint(db, checkpoint_id))
        unknown = NotFound(f"There is no checkpoint {checkpoint_id[:100]!r}.", param="checkpoint")
        if checkpoint is None:
            raise unknown
        try:
            job = await self.records.get(checkpoint.job_id, key)
        except NotFound:
            raise unknown from None
        name = name or job.publish_as
        self._adapters.check_name(name, "name", key)
        return await self._adapters.publish(name, Path(checkpoint.path), job_id=job.id)

    def _ended(self, job_id: str) -> None:
        """A job is over: nobody need prepare it any more."""
        self._submitted.discard(job_id)
        self._deaths.clear(job_id)
        with contextlib.suppress(KeyError):
            if self._tasks[job_id] is not asyncio.current_task():
                self._tasks[job_id].cancel()
