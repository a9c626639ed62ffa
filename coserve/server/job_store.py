"""Rows of fine-tuning jobs, their events and checkpoints. All functions run inside a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from coserve.training.job import LoraSpec, TrainingSpec

EVENT_PREFIX = "ftevent-"
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """Questions of a file, of which a share of `min_score` has to be answered right, in at most `max_tokens`
    tokens: "exact" (but for white space around it) or so that the answer "contains" the right one."""

    name: str
    file: str
    min_score: float = 1.0
    match: str = "exact"
    max_tokens: int = 256


class PublishGate(msgspec.Struct, frozen=True, kw_only=True):
    """What has to hold of a job's adapter before it is published; None and () ask for nothing."""

    max_valid_loss: float | None = None
    min_valid_accuracy: float | None = None
    checks: tuple[Check, ...] = ()


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a check came out: `score` is the share of `questions` that were answered right."""

    name: str
    score: float
    questions: int


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a job.

    `publish_as` is the name its adapter gets, `auto` the settings that the data will decide, `step_seconds`
    how long a step takes, averaged over the latest, `status_reason` what a queued job waits for;
    `request_digest` tells a repeat of an idempotent request from another one under the same key, `tenant`
    whose job it is; `publish_if` is what its adapter has to meet, `check_results` how its checks came out.
    """

    id: str
    status: str
    model: str
    adapter: str
    publish_as: str
    training_file: str
    method: str
    lora: LoraSpec
    training: TrainingSpec
    seed: int
    created_at: int
    auto: tuple[str, ...] = ()
    validation_file: str = ""
    suffix: str = ""
    init_from: str = ""
    metadata: dict[str, str] = {}
    priority: int = 0
    idempotency_key: str = ""
    request_digest: str = ""
    tenant: str = ""
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int = 0
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    tokens_per_second: float = 0.0
    step_seconds: float = 0.0
    share: float = 0.0
    loss: float | None = None
    valid_loss: float | None = None
    status_reason: str = ""
    error: JobError | None = None
    result_files: list[str] = []
    publish_if: PublishGate | None = None
    check_results: tuple[CheckResult, ...] = ()

    @property
    def is_over(self) -> bool:
        """It has ended and will not change."""
        return self.status in TERMINAL


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event; `seq` orders all events and makes the id. Numbers are set on `metrics` events."""

    job_id: str
    type: str
    created_at: int
    seq: int = 0
    level: str = "info"
    message: str = ""
    status: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    tokens_per_second: float = 0.0
    share: float = 0.0
    trained_tokens: int = 0
    seconds: float = 0.0
    checkpoint: str = ""

    @property
    def id(self) -> str:
        """As clients see it; ids sort like the events."""
        return f"{EVENT_PREFIX}{self.seq:012d}"


@dataclass(frozen=True)
class CheckpointRow:
    """A durable checkpoint: `path` is its directory."""

    id: str
    job_id: str
    step: int
    path: str
    train_loss: float
    created_at: int


_job = msgspec.msgpack.Decoder(JobRecord)
_event = msgspec.msgpack.Decoder(JobEvent)
_encode = msgspec.msgpack.Encoder().encode


def insert(connection: sqlite3.Connection, job: JobRecord) -> None:
    """Add a job."""
    connection.execute(
        "INSERT INTO jobs (id, status, idempotency_key, record) VALUES (?, ?, ?, ?)",
        (job.id, job.status, _idempotency(job), _encode(job)),
    )


def _idempotency(job: JobRecord) -> str | None:
    """The key under which a repeated request is known; each tenant has its own."""
    if not job.idempotency_key or not job.tenant:
        return job.idempotency_key or None
    return f"{job.tenant}\0{job.idempotency_key}"


def save(connection: sqlite3.Connection, job: JobRecord) -> None:
    """Write a job's record over the one before."""
    connection.execute(
        "UPDATE jobs SET status = ?, record = ? WHERE id = ?", (job.status, _encode(job), job.id)
    )


def get(connection: sqlite3.Connection, job_id: str) -> JobRecord | None:
    """A job by id."""
    row = connection.execute("SELECT record FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return _job.decode(row["record"]) if row else None


def by_key(connection: sqlite3.Connection, job: JobRecord) -> JobRecord | None:
    """The job that an earlier request with the tenant and the idempotency key of `job` made."""
    values = (_idempotency(job),)
    row = connection.execute("SELECT record FROM jobs WHERE idempotency_key = ?", values).fetchone()
    return _job.decode(row["record"]) if row else None


def all_jobs(connection: sqlite3.Connection) -> list[JobRecord]:
    """Every job, newest first."""
    return [
        _job.decode(row["record"]) for row in connection.execute("SELECT record FROM jobs ORDER BY seq DESC")
    ]


def count_open(connection: sqlite3.Connection, tenant: str) -> int:
    """Number of a tenant's jobs that haven't ended."""
    marks = ", ".join("?" * len(TERMINAL))
    rows = connection.execute(f"SELECT record FROM jobs WHERE status NOT IN ({marks})", tuple(TERMINAL))
    return sum(_job.decode(row["record"]).tenant == tenant for row in rows)


def count_by_status(connection: sqlite3.Connection) -> dict[str, int]:
    """Number of jobs in each status."""
    return dict(tuple(row) for row in connection.execute("SELECT status, count(*) FROM jobs GROUP BY status"))


def add_event(connection: sqlite3.Connection, event: JobEvent) -> None:
    """Append an event; its `seq` is given here."""
    step = event.step if event.type == "metrics" else None
    connection.execute(
        "INSERT INTO events (job_id, type, step, record) VALUES (?, ?, ?, ?)",
        (event.job_id, event.type, step, _encode(event)),
    )


def has_message(connection: sqlite3.Connection, job_id: str, text: str) -> bool:
    """Whether a job's log has this message already."""
    rows = connection.execute("SELECT record FROM events WHERE job_id = ? AND type = 'message'", (job_id,))
    return any(_event.decode(row["record"]).message == text for row in rows)


def metrics_event(connection: sqlite3.Connection, job_id: str, step: int) -> JobEvent | None:
    """The one metrics event of a step."""
    row = connection.execute(
        "SELECT seq, record FROM events WHERE job_id = ? AND step = ? AND type = 'metrics'", (job_id, step)
    ).fetchone()
    return _read(row) if row else None


def _read(row: sqlite3.Row) -> JobEvent:
    return msgspec.structs.replace(_event.decode(row["record"]), seq=row["seq"])


def events_after(connection: sqlite3.Connection, job_id: str, seq: int) -> list[JobEvent]:
    """A job's events after one, oldest first."""
    rows = connection.execute(
        "SELECT seq, record FROM events WHERE job_id = ? AND seq > ? ORDER BY seq", (job_id, seq)
    )
    return [_read(row) for row in rows]


def newest_events(
    connection: sqlite3.Connection, job_id: str, before: int | None, limit: int
) -> list[JobEvent]:
    """A job's last events (before one), newest first."""
    rows = connection.execute(
        "SELECT seq, record FROM events WHERE job_id = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
        (job_id, 2**62 if before is None else before, limit),
    )
    return [_read(row) for row in rows]


def event_seq(connection: sqlite3.Connection, job_id: str, event_id: str) -> int | None:
    """The place of a job's event in the order of all; None when the job has no such event."""
    number = event_id.removeprefix(EVENT_PREFIX)
    if number == event_id or not number.isascii() or not number.isdecimal() or len(number) > 18:
        return None
    row = connection.execute(
        "SELECT seq FROM events WHERE job_id = ? AND seq = ?", (job_id, int(number))
    ).fetchone()
    return row["seq"] if row else None


def add_checkpoint(connection: sqlite3.Connection, checkpoint: CheckpointRow) -> bool:
    """Add a checkpoint; False when its step is known already."""
    cursor = connection.execute(
        "INSERT OR IGNORE INTO checkpoints (id, job_id, step, path, train_loss, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            *(checkpoint.id, checkpoint.job_id, checkpoint.step, checkpoint.path, checkpoint.train_loss),
            checkpoint.created_at,
        ),
    )
    return cursor.rowcount > 0


def checkpoints(connection: sqlite3.Connection, job_id: str | None = None) -> Sequence[CheckpointRow]:
    """Checkpoints of a job (or of all), newest first."""
    where, values = ("WHERE job_id = ?", (job_id,)) if job_id else ("", ())
    rows = connection.execute(f"SELECT * FROM checkpoints {where} ORDER BY job_id, step DESC", values)
    return [CheckpointRow(**{name: row[name] for name in CheckpointRow.__dataclass_fields__}) for row in rows]


def checkpoint(connection: sqlite3.Connection, checkpoint_id: str) -> CheckpointRow | None:
    """A checkpoint by id."""
    row = connection.execute("SELECT * FROM checkpoints WHERE id = ?", (checkpoint_id,)).fetchone()
    return CheckpointRow(**{name: row[name] for name in CheckpointRow.__dataclass_fields__}) if row else None


def drop_checkpoint(connection: sqlite3.Connection, checkpoint_id: str) -> None:
    """Forget a checkpoint."""
    connection.execute("DELETE FROM checkpoints WHERE id = ?", (checkpoint_id,))
