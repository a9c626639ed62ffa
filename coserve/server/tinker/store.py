"""Rows of training runs and of what they have saved. All functions run inside a `Database` transaction."""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec

from coserve.training.job import LoraSpec


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A training run: one model. `seen_at` is when something was last asked of it, or saved."""

    id: str
    session_id: str
    tenant: str
    base_model: str
    lora: LoraSpec
    seed: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    created_at: float
    seen_at: float
    user_metadata: dict[str, Any] | None = None


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """Weights on disk. `kind` is "weights" (with the optimizer's state) or "sampler_weights"; those without a
    row are `ephemeral`: they go with their session."""

    path: str
    kind: str
    name: str
    run_id: str
    tenant: str
    folder: str
    digest: str
    size_bytes: int
    created_at: float
    expires_at: float | None = None
    user_metadata: dict[str, str] | None = None
    ephemeral: bool = False


def put_run(connection: sqlite3.Connection, run: Run) -> None:
    """Add a run, or replace what is known of it."""
    connection.execute("INSERT OR REPLACE INTO tinker_runs VALUES (?, ?)", (run.id, msgspec.json.encode(run)))


def put_saved(connection: sqlite3.Connection, saved: Saved) -> None:
    """Add what was saved, in place of what was there under its path."""
    connection.execute(
        "INSERT OR REPLACE INTO tinker_checkpoints VALUES (?, ?)", (saved.path, msgspec.json.encode(saved))
    )


def delete_saved(connection: sqlite3.Connection, path: str) -> None:
    """Forget what was saved under a path."""
    connection.execute("DELETE FROM tinker_checkpoints WHERE path = ?", (path,))


def everything(connection: sqlite3.Connection) -> tuple[list[Run], list[Saved]]:
    """All runs and all that was saved, in the order of their coming."""
    runs = connection.execute("SELECT record FROM tinker_runs ORDER BY rowid").fetchall()
    saved = connection.execute("SELECT record FROM tinker_checkpoints ORDER BY rowid").fetchall()
    return (
        [msgspec.json.decode(row["record"], type=Run) for row in runs],
        [msgspec.json.decode(row["record"], type=Saved) for row in saved],
    )
