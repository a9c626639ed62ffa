"""What becomes of a job's record, and the events that say so. Pure functions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace as change

from coserve.server import job_store
from coserve.server.application.job_data import Prepared
from coserve.server.job_store import CheckpointRow, CheckResult, JobError, JobEvent, JobRecord
from coserve.training.divergence import settings_warnings
from coserve.training.job import StepMetrics, TrainingSpec

PACE = 0.1  # weight of a new step's duration in the running mean
Transition = tuple[JobRecord, Sequence[JobEvent]]


def checkpoint_names(job: JobRecord, checkpoint: CheckpointRow) -> tuple[str, str]:
    """A checkpoint's names: its id, and the name of its job's adapter with the step."""
    return checkpoint.id, f"{job.publish_as}:ckpt-step-{checkpoint.step}"


def event_of(job: JobRecord, kind: str, message: str, level: str = "info", **values: Any) -> JobEvent:
    """An event of a job, now."""
    return JobEvent(
        job_id=job.id, type=kind, created_at=int(time.time()), level=level, message=message, **values
    )


_STATUS_MESSAGES = {
    "validating_files": "Validating {files}",
    "queued": "Files validated, moving job to queued state",
    "running": "Fine-tuning job started",
    "paused": "Fine-tuning job paused",
    "succeeded": "The job has successfully completed",
    "failed": "The job failed: {error}",
    "cancelled": "The job was cancelled",
}


def status_event(job: JobRecord) -> JobEvent:
    """The event that says which status the job has."""
    error = job.error.message if job.error else ""
    files = f"training file: {job.training_file}"
    if job.validation_file:
        files += f" and validation file: {job.validation_file}"
    message = _STATUS_MESSAGES[job.status].format(files=files, error=error)
    level = "error" if job.status == "failed" else "info"
    return event_of(
        job, "status", message, level=level, status=job.status, step=job.step, total_steps=job.total_steps
    )


def moved(job: JobRecord, status: str) -> Transition:
    """The job in another status; nothing happens when it has it already."""
    if status == job.status:
        return job, []
    after = change(job, status=status, status_reason="")
    if status == "running" and job.started_at is None:
        after = change(after, started_at=int(time.time()))
    if status == "paused":
        after = change(after, estimated_finish=None, share=0.0)
    if status in job_store.TERMINAL:
        after = change(after, finished_at=int(time.time()), estimated_finish=None, share=0.0)
    return after, [status_event(after)]


def waiting(job: JobRecord, reason: str) -> Transition:
    """The job in the queue, and why it can't start yet."""
    if job.status_reason == reason:
        return job, []
    after = change(job, status="queued", status_reason=reason, share=0.0, estimated_finish=None)
    return after, [event_of(after, "message", reason)]


def after_validation(
    job: JobRecord, prepared: Prepared, training: TrainingSpec, total_steps: int
) -> Transition:
    """The job with its data read: what was found, the settings in force, and the queue as its next state."""
    remarks = prepared.remarks()
    if job.auto:
        remarks.append(("info", f"Chosen for {prepared.examples} examples: {_chosen(training, job.auto)}"))
    remarks += [("warn", text) for text in settings_warnings(training)]
    if job.validation_file == job.training_file:
        remarks.append(("warn", "The validation file is the training file: its loss says little."))
    events = [event_of(job, "message", text, level=level) for level, text in remarks]
    after = change(job, training=training, auto=(), total_steps=total_steps)
    if job.status == "paused":
        return after, events
    after, said = moved(after, "queued")
    return after, [*events, *said]


def _chosen(training: TrainingSpec, names: Sequence[str]) -> str:
    """The settings in force, by the names that stand for them."""
    shown = {name: name for name in names} | {"learning_rate_multiplier": "learning_rate"}
    return ", ".join(f"{shown[name]} {getattr(training, shown[name]):g}" for name in names)


def progressed(job: JobRecord, event: JobEvent) -> JobRecord:
    """The job after a step that is counted for the first time."""
    now = time.time()
    started = job.started_at or int(now)
    pace = job.step_seconds + (event.seconds - job.step_seconds) * (PACE if job.step_seconds else 1.0)
    return change(
        job,
        started_at=started,
        step=max(job.step, event.step),
        total_steps=event.total_steps,
        epoch=event.epoch,
        tokens_per_second=event.tokens_per_second,
        share=event.share,
        loss=event.loss,
        valid_loss=job.valid_loss if event.valid_loss is None else event.valid_loss,
        trained_tokens=job.trained_tokens + event.trained_tokens,
        step_seconds=pace,
        estimated_finish=int(now + pace * (event.total_steps - event.step)),
    )


def same_step(known: JobEvent, again: JobEvent) -> bool:
    """Whether a replayed step gave the same bits (its speed may differ)."""

    def bits(event: JobEvent) -> tuple[float, ...]:
        return event.loss, event.learning_rate, event.grad_norm, event.trained_tokens

    return bits(known) == bits(again)


def checked(job: JobRecord, results: Sequence[CheckResult]) -> Transition:
    """The job with the scores of its checks."""
    texts = [f"Check {found.name!r}: {found.score:.4g} of {found.questions} right" for found in results]
    return change(job, check_results=tuple(results)), [event_of(job, "message", text) for text in texts]


def failed(job: JobRecord, error: JobError) -> Transition:
    """The job ended by an error."""
    return moved(change(job, error=error), "failed")


def success(job: JobRecord, name: str, results: list[str]) -> Transition:
    """Published as `name`; the terminal status comes last."""
    after, said = moved(change(job, fine_tuned_model=name, result_files=results), "succeeded")
    return after, [event_of(job, "message", f"New fine-tuned model created: {name}"), *said]


def step_event(job_id: str, metrics: StepMetrics) -> JobEvent:
    """The metrics event of one optimizer step."""
    message = f"Step {metrics.step}/{metrics.total_steps}: training loss={metrics.loss:.4f}"
    if metrics.valid_loss is not None:
        message += f", validation loss={metrics.valid_loss:.4f}"
    return JobEvent(
        job_id=job_id,
        type="metrics",
        created_at=int(metrics.time or time.time()),
        message=message,
        step=metrics.step,
        total_steps=metrics.total_steps,
        epoch=metrics.epoch,
        loss=metrics.loss,
        accuracy=metrics.accuracy,
        valid_loss=metrics.valid_loss,
        valid_accuracy=metrics.valid_accuracy,
        learning_rate=metrics.learning_rate,
        grad_norm=metrics.grad_norm,
        tokens_per_second=metrics.tokens_per_second,
        share=metrics.share,
        trained_tokens=metrics.trained_tokens,
        seconds=metrics.tokens / metrics.tokens_per_second if metrics.tokens_per_second else 0.0,
    )
