"""All training of the engine: which jobs exist, what the scheduler may run of them, what comes of it; and the
same for the models that are trained by calls (called_models.py).

The scheduler decides when; a `RunningJob` knows how; this module stands between them. It turns plans into
microbatches with memory, spans into moved cursors, finished microbatches into optimizer steps, and tells a
`JobListener` what happened.
"""

from __future__ import annotations

import logging
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.latency_model import LatencyModel
from coserve.core.live_snapshots import LiveSnapshots
from coserve.core.step_plan import StepPlan
from coserve.core.training_queue import TrainingQueue
from coserve.core.training_sequence import TrainingSequence
from coserve.errors import (
    AdapterNotLive,
    CoserveError,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.decoder import Decoder
from coserve.training.backward_calls import BackwardCalls
from coserve.training.called_models import CalledModels, CallListener
from coserve.training.divergence import Diverged, diverged
from coserve.training.job import JobSpec
from coserve.training.job_listener import JobListener
from coserve.training.job_places import JobPlaces
from coserve.training.microbatch import Microbatch
from coserve.training.pending_jobs import PendingJobs
from coserve.training.running_job import RunningJob
from coserve.training.trainer import Trainer
from coserve.training.unit_calls import Stop, never
from coserve.worker.kv_tensors import KVTensors
from coserve.worker.streams import InOrder, Streams

logger = logging.getLogger(__name__)

CHECKPOINT_WAIT = 0.005  # seconds at a time for a checkpoint that a job waits for while nothing else runs


class JobManager:
    """Jobs by id. Everything happens between or inside steps, in the engine's one thread."""

    def __init__(
        self,
        decoder: Decoder,
        pool: AdapterPool,
        slots: AdapterSlots,
        kv: KVTensors,
        queue: TrainingQueue,
        model: LatencyModel,
        listener: JobListener,
        live: LiveSnapshots,
        calls: CallListener,
        streams: Streams | None = None,
        memory: int | None = None,
    ) -> None:
        """`memory` are the bytes that jobs may hold outside the pool; None: no bound. `calls` hears of the
        models that are trained by calls."""
        self._seconds = 0.0  # of the step, beside the calls'
        self._decoder, self._pool, self._kv = decoder, pool, kv
        self._places = JobPlaces(decoder.config, pool, slots, live, memory)
        self._pending = PendingJobs(self._places, listener)
        self._queue, self._model, self._listener, self._live = queue, model, listener, live
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: dict[str, RunningJob] = {}
        self.models = CalledModels(decoder, pool, kv, self._places, queue, self._writer, calls)
        self._trainers: Mapping[str, Trainer] = ChainMap(self._jobs, self.models.by_id)  # type: ignore[arg-type]
        streams = streams or InOrder()
        self.calls = BackwardCalls(self._trainers, queue, model, streams, self._charge, self._fail)
        self._forward_tokens = 0

    # ------------------------------------------------------------------ state

    @property
    def has_work(self) -> bool:
        """Some job could use device time now, or waits for its last checkpoint; or a model for a file."""
        files = self.models.has_files or any(job.is_writing for job in self._jobs.values())
        return self._queue.has_work or files

    @property
    def step_seconds(self) -> float:
        """What jobs have taken of the step."""
        return self._seconds + self.calls.seconds

    @property
    def microbatches(self) -> Mapping[str, Microbatch]:
        """Those under way by sequence id."""
        return ChainMap(*(dict(trainer.microbatches) for trainer in self._trainers.values()))

    @property
    def optimizer_bytes(self) -> int:
        """Masters, gradients and moments of all jobs and models."""
        return sum(trainer.state_bytes for trainer in self._trainers.values())

    @property
    def workspace_bytes(self) -> int:
        """What jobs hold outside the pool beside that: plans of their data, and microbatches under way."""
        return sum(trainer.workspace_bytes for trainer in self._trainers.values())

    def take_token_counts(self) -> tuple[int, int]:
        """Forward and backward tokens since the last call."""
        counts = (self._forward_tokens, self.calls.tokens)
        self._forward_tokens = self.calls.tokens = 0
        return counts

    # ------------------------------------------------------------------ calls

    def submit(self, spec: JobSpec) -> None:
        """Take a job on; it starts when adapter rows and memory are free. InvalidRequest: it runs already."""
        if spec.job_id in self._jobs or spec.job_id in self._pending:
            raise InvalidRequest(f"job {spec.job_id} is running already", param="job_id")
        self._pending.add(spec)
        self._start_pending()

    def control(self, job_id: str, action: str) -> None:
        """Pause, resume or cancel. Raises NotFound, or FailedPrecondition where the state forbids it."""
        if job_id in self._pending:
            self._pending.control(job_id, action)
            self._start_pending()
            return
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"The engine has no job {job_id}.", param="job_id")
        if not self._settle(job):
            raise FailedPrecondition(f"job {job_id} has just ended", param="job_id")
        if action == "cancel":
            self._end(job, "cancelled")
        elif action == "pause" and not job.paused:
            self._drop_step(job)
            job.paused = True
            if not job.unsaved or self._save(job):
                self._listener.status(job_id, "paused")
        elif action == "resume" and job.paused:
            job.paused = False
            self._listener.status(job_id, "running")
            self._begin(job)
        else:
            raise FailedPrecondition(f"job {job_id} can't {action} in its state", param="job_id")

    def read_live(self, job_id: str) -> str:
        """A request reads a job's adapter as of its last committed step: the key of that snapshot.

        Raises AdapterNotLive before the job's first step, Unavailable while it has no rows and when all rows
        are in use.
        """
        job = self._jobs.get(job_id)
        if job is not None and job.is_updating:
            self._complete(job)
            job = self._jobs.get(job_id)
        if job is None:
            reason = "is not in training now; it waits for its turn, or has just ended. Try again"
            raise Unavailable(f"Job {job_id} {reason}.", param="model")
        if job.step == 0:
            raise AdapterNotLive(f"Job {job_id} has not finished its first optimizer step.", param="model")
        return self._live.take(job_id, job.step)

    def checkpoint_all(self) -> None:
        """Make every job's last committed step durable (before the engine stops)."""
        for job in list(self._jobs.values()):
            if self._settle(job) and job.unsaved:
                self._save(job)

    # ------------------------------------------------------------------ inside a step

    def prepare(self, plan: StepPlan) -> None:
        """Before the forward: forget what was evicted or downgraded, give memory to microbatches that
        begin."""
        self._seconds = self.calls.seconds = 0.0
        if plan.evicted:
            self._forget_evicted(plan.evicted)
        for sequence in plan.downgraded:
            self.calls.finish_layer(sequence)
        microbatches = self.microbatches
        for sequence in plan.downgraded:
            if sequence.sequence_id not in microbatches:
                continue
            activations = microbatches[sequence.sequence_id].activations
            if activations is not None:
                activations.downgrade(sequence.level)
                logger.info("%s keeps only %s", sequence.sequence_id, _policies(sequence))
        for span in plan.training_forward:
            sequence = span.sequence
            if microbatches[sequence.sequence_id].activations is None:
                assert sequence.extent is not None
                extent = self._kv.extent(sequence.extent, sequence.slabs)
                self._trainers[sequence.job_id].place(sequence.sequence_id, extent, sequence.level)
                logger.debug("%s keeps %s", sequence.sequence_id, _policies(sequence))

    def commit_forward(self, plan: StepPlan, seconds: float, exposed: float) -> None:
        """The plan's forward windows ran: `seconds` of work, by which the step became `exposed` longer."""
        rows = sum(span.length for span in plan.training_forward)
        if not rows:
            return
        self._charge_forward(plan, seconds, exposed)
        self._forward_tokens += rows
        if plan.apart:
            self._model.observe_unit("apart", rows, seconds + self._queue.awake())
        for span in plan.training_forward:
            span.sequence.cursor += span.length
            if self._queue.release_head(span.sequence):
                self.microbatches[span.sequence.sequence_id].saved.release_head()

    def rest_forward(self, plan: StepPlan, seconds: float, layer_seconds: float) -> None:
        """The plan's forward windows stopped between two layers after `seconds`, a layer's time each."""
        self._charge_forward(plan, seconds, seconds)
        self._queue.rest(plan.training_forward, seconds, layer_seconds)

    def _charge_forward(self, plan: StepPlan, seconds: float, exposed: float) -> None:
        rows = sum(span.length for span in plan.training_forward)
        self._seconds += exposed
        for span in plan.training_forward:
            self._charge(span.sequence.job_id, seconds * span.length / rows)

    def advance(self, deadline: float, arrivals: Callable[[], bool] | None) -> None:
        """After a step: checkpoints that are written; optimizer steps whose gradients are complete, as far as
        pieces of their updates end before `deadline`, or with `arrivals` until a message waits; and the steps
        after them."""
        for job in list(self._jobs.values()):
            if job.is_writing:
                idle = arrivals is not None and self.step_seconds == 0.0
                self._take_checkpoint(job, CHECKPOINT_WAIT if idle else 0.0)
            if job.paused or not job.sequences or not all(s.done for s in job.sequences):
                continue
            began = time.perf_counter()
            if not job.is_writing and (arrivals is not None or began < deadline):
                self._complete(job, Stop(deadline, arrivals))
                seconds = time.perf_counter() - began
                self._seconds += seconds
                self._charge(job.spec.job_id, seconds)
            rests = bool(job.sequences) and all(s.done for s in job.sequences)
            self._queue.owe_update(job.spec.job_id, rests)
        if self._pending:
            self._start_pending()
        self._seconds += self.models.advance(deadline, arrivals, self._charge)

    # ------------------------------------------------------------------ parts

    def _fail(self, job_id: str, error: Exception) -> None:
        """One job's fault must not take the engine, and everybody's requests, down with it."""
        if job_id in self.models.by_id:
            self.models.fail(job_id, error)
            return
        self._end(self._jobs[job_id], "failed", _as_error(job_id, error))

    def _charge(self, job_id: str, seconds: float) -> None:
        self._queue.charge(job_id, seconds)
        trainer = self._trainers.get(job_id)
        if trainer is not None:
            trainer.device_seconds += seconds

    def _start_pending(self) -> None:
        for spec in self._pending.ready():
            self._start(spec)

    def _start(self, spec: JobSpec) -> None:
        """A job that has its place."""
        rows, kept = self._places.rows(spec)
        try:
            next_rows = partial(self._places.next_rows, spec.job_id)
            job = RunningJob(spec, self._decoder, self._pool, rows, kept, next_rows)
            job.check_memory(self._kv)
        except Exception as error:
            self._places.free(spec)
            self._listener.status(spec.job_id, "failed", _as_error(spec.job_id, error))
            return
        self._jobs[spec.job_id] = job
        for metrics in job.restored_events:
            self._listener.progress(spec.job_id, metrics)
        if job.restored_path is not None:
            self._tell_checkpoint(job, job.restored_path)
        if job.finished:
            self._end(job, "succeeded")
        else:
            self._listener.status(spec.job_id, "running")
            self._begin(job)

    def _begin(self, job: RunningJob) -> None:
        try:
            job.begin(self._kv)
        except Exception as error:
            self._end(job, "failed", _as_error(job.spec.job_id, error))
            return
        spec = job.spec
        self._queue.submit(spec.job_id, job.sequences, spec.priority, spec.tenant, spec.share)

    def _complete(self, job: RunningJob, stop: Callable[[], bool] = never) -> None:
        """All of a job's units have run: its step is committed or scored, and what follows begins. An update
        may rest before that."""
        try:
            metrics = job.complete(stop)
        except Diverged as fault:
            self._quarantine(job, fault.reason)
            return
        except Exception as error:
            self._end(job, "failed", _as_error(job.spec.job_id, error))
            return
        if job.is_updating:
            return
        job.drop_step()
        if metrics is not None:
            self._listener.progress(job.spec.job_id, metrics)
            for level, text in job.remarks(metrics):
                self._listener.message(job.spec.job_id, level, text)
            if job.checkpoint_due:
                job.write_checkpoint(self._writer)
        if not job.finished:
            self._begin(job)
        elif job.is_writing:
            self._queue.remove(job.spec.job_id)
        else:
            self._end(job, "succeeded")

    def _settle(self, job: RunningJob) -> bool:
        """Do what rests of the job's update, and have its checkpoint on disk; False where that ends it."""
        if job.is_updating:
            self._complete(job)
        if job.is_writing:
            self._take_checkpoint(job, None)
        return self._jobs.get(job.spec.job_id) is job

    def _quarantine(self, job: RunningJob, reason: str) -> None:
        """A step that isn't finite changes nothing. It runs once more, against a fault that passes; a second
        time it ends the job."""
        step = job.step + 1
        if job.diverged_step == step:
            self._end(job, "failed", diverged(step, f"{reason}, twice", job.kept))
            return
        job.diverged_step = step
        text = f"Step {step}: {reason}; the adapter is unchanged and the step runs once more."
        self._listener.message(job.spec.job_id, "warn", text)
        job.drop_step()
        self._begin(job)

    def _save(self, job: RunningJob) -> bool:
        """Make the last committed step durable, now; False where the disk refuses, which ends the job."""
        job.write_checkpoint(self._writer)
        self._take_checkpoint(job, None)
        return job.spec.job_id in self._jobs

    def _take_checkpoint(self, job: RunningJob, seconds: float | None) -> None:
        """Tell of the checkpoint that a thread wrote, if it is there after so many seconds (None: waits for
        it). A disk that refuses ends the job, not the engine."""
        try:
            path = job.take_checkpoint(seconds)
        except OSError as error:
            reason = f"the checkpoint of step {job.step} can't be written: {error.strerror} ({job.kept})"
            self._end(job, "failed", InternalError(reason, code="checkpoint_failed"))
            return
        if path is None:
            return
        self._tell_checkpoint(job, path)
        if job.finished:
            self._end(job, "succeeded")

    def _tell_checkpoint(self, job: RunningJob, path: str) -> None:
        self._listener.checkpoint(job.spec.job_id, job.step, path, job.last_loss, job.checkpoint_steps)

    def _end(self, job: RunningJob, status: str, error: CoserveError | None = None) -> None:
        job_id = job.spec.job_id
        if job.is_writing:
            with suppress(OSError):  # the job ends for another reason
                self._tell_checkpoint(job, str(job.take_checkpoint(None)))
        self._drop_step(job)
        del self._jobs[job_id]
        parted = self._live.part(job_id)
        self._places.free(job.spec, keep=status == "succeeded" and job.holds_result and not parted)
        result = job.result_path if status == "succeeded" else ""
        self._listener.status(job_id, status, error, result)

    def _drop_step(self, job: RunningJob) -> None:
        """Leave the optimizer step under way: its memory is free, its gradients are forgotten."""
        self._queue.remove(job.spec.job_id)
        job.drop_step()

    def _forget_evicted(self, evicted: list[TrainingSequence]) -> None:
        for job_id in {sequence.job_id for sequence in evicted}:
            lost = {s.sequence_id for s in evicted if s.job_id == job_id}
            logger.info("%s lost their activations to requests", ", ".join(sorted(lost)))
            self._trainers[job_id].forget_activations(lost)


def _policies(sequence: TrainingSequence) -> str:
    """For the log: "A in 20 layers, B in 4"."""
    letters = [sequence.policy(height) for height in range(sequence.layers)]
    counts = [f"{letter} in {letters.count(letter)}" for letter in "ABC" if letter in letters]
    return f"{', '.join(counts)} of {sequence.layers} layers"


def _as_error(job_id: str, error: Exception) -> CoserveError:
    if isinstance(error, CoserveError):
        return error
    logger.error("job %s failed", job_id, exc_info=error)
    return InternalError("The job failed in the engine; see the engine's log.")
