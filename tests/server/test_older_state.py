"""A state directory of the first release: its database is brought up to date, its records stay readable."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec

from coserve.server import file_store, job_store
from coserve.server.database import _MIGRATIONS, Database
from coserve.server.openai.job_bodies import checkpoint_body, event_body, job_body
from tests.server.fake_engine import MODEL

JOB = {
    "id": "ftjob-1",
    "status": "running",
    "model": "m",
    "adapter": "",
    "publish_as": "a",
    "training_file": "file-1",
    "method": "supervised",
    "lora": {"r": 8, "lora_alpha": 16.0, "target_modules": ["q_proj"]},
    "training": {"n_epochs": 2, "optimizer": "adamw", "learning_rate": 1e-3},
    "seed": 1,
    "created_at": 5,
    "step": 1,
    "total_steps": 4,
}
EVENT = {"job_id": "ftjob-1", "type": "metrics", "created_at": 6, "step": 1, "total_steps": 4, "loss": 2.5}


def test_the_first_schema_is_read(tmp_path: Path) -> None:
    path = tmp_path / "coserve.sqlite"
    pack = msgspec.msgpack.encode
    with sqlite3.connect(path, isolation_level=None) as old:
        old.executescript(f"{_MIGRATIONS[0]} PRAGMA user_version = 1;")
        old.execute("INSERT INTO files VALUES ('file-1', 'a.jsonl', 3, 'fine-tune', 4)")
        old.execute("INSERT INTO jobs (id, status, record) VALUES ('ftjob-1', 'running', ?)", (pack(JOB),))
        old.execute(
            "INSERT INTO events (job_id, type, step, record) VALUES ('ftjob-1', 'metrics', 1, ?)",
            (pack(EVENT),),
        )
        old.execute("INSERT INTO checkpoints VALUES ('ftckpt-1', 'ftjob-1', 1, '/p', 2.5, 6)")
    old.close()
    database = Database(path)

    def read(db: sqlite3.Connection) -> tuple:
        return (
            file_store.get(db, "file-1"),
            job_store.get(db, "ftjob-1"),
            job_store.metrics_event(db, "ftjob-1", 1),
            job_store.checkpoints(db, "ftjob-1")[0],
            db.execute("PRAGMA user_version").fetchone()[0],
        )

    file, job, event, checkpoint, version = asyncio.run(database.run(read))
    database.close()
    assert version == len(_MIGRATIONS) and file.expires_at is None
    assert job.training.n_epochs == 2 and job.training.packing is False and job.auto == ()
    assert job.lora.r == 8 and job.lora.lora_dropout == 0.0
    body = job_body(job, MODEL)
    assert body["hyperparameters"]["learning_rate_multiplier"] == 5.0 and body["validation_file"] is None
    assert event_body(event)["data"]["train_loss"] == 2.5 and "valid_loss" not in event_body(event)["data"]
    assert checkpoint_body(job, checkpoint, event)["metrics"] == {"step": 1, "train_loss": 2.5}
