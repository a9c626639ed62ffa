"""The server's SQLite database: one writer thread, WAL, migrations by `PRAGMA user_version`."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from coserve.errors import ConfigError

_T = TypeVar("_T")

_MIGRATIONS = (
    """
    CREATE TABLE files (
        id TEXT PRIMARY KEY, filename TEXT NOT NULL, bytes INTEGER NOT NULL, purpose TEXT NOT NULL,
        created_at INTEGER NOT NULL
    );
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
        idempotency_key TEXT UNIQUE, record BLOB NOT NULL
    );
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, type TEXT NOT NULL, step INTEGER,
        record BLOB NOT NULL
    );
    CREATE INDEX events_by_job ON events (job_id, seq);
    CREATE UNIQUE INDEX one_metrics_event_a_step ON events (job_id, step) WHERE type = 'metrics';
    CREATE TABLE checkpoints (
        id TEXT PRIMARY KEY, job_id TEXT NOT NULL, step INTEGER NOT NULL, path TEXT NOT NULL,
        train_loss REAL NOT NULL, created_at INTEGER NOT NULL, UNIQUE (job_id, step)
    );
    CREATE TABLE adapter_versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, path TEXT NOT NULL,
        root TEXT NOT NULL, origin TEXT NOT NULL, rank INTEGER NOT NULL, job_id TEXT, listed INTEGER NOT NULL,
        pinned INTEGER NOT NULL, created_at INTEGER NOT NULL, PRIMARY KEY (name, version)
    );
    CREATE TABLE adapter_names (name TEXT PRIMARY KEY, current INTEGER NOT NULL, highest INTEGER NOT NULL);
    """,
    """
    ALTER TABLE files ADD COLUMN expires_at INTEGER;
    CREATE TABLE uploads (
        id TEXT PRIMARY KEY, filename TEXT NOT NULL, bytes INTEGER NOT NULL, purpose TEXT NOT NULL,
        status TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, keep_seconds INTEGER,
        file_id TEXT
    );
    CREATE TABLE upload_parts (
        id TEXT PRIMARY KEY, upload_id TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
    );
    """,
    "CREATE TABLE aliases (name TEXT PRIMARY KEY, model TEXT NOT NULL, created_at INTEGER NOT NULL);",
    """
    ALTER TABLE files ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
    ALTER TABLE uploads ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
    """,
    """
    CREATE TABLE tinker_runs (id TEXT PRIMARY KEY, record BLOB NOT NULL);
    CREATE TABLE tinker_checkpoints (path TEXT PRIMARY KEY, record BLOB NOT NULL);
    """,
)


class Database:
    """Runs functions on one connection in one thread; each is a transaction, durable when it returns."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._connection = self._thread.submit(_open, path).result()

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """The result of `work(connection)`; what it wrote is committed, or rolled back when it raised."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, work)

    def _transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(self._connection)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return result

    def close(self) -> None:
        """Close the connection; later calls fail."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise ConfigError(f"--state-dir: {path.name} can't be opened: {error}.", param="state_dir") from None
    if version > len(_MIGRATIONS):
        raise ConfigError(
            f"--state-dir: {path.name} was written by a newer coserve (schema {version}, this one knows "
            f"{len(_MIGRATIONS)}); use that version or another directory.",
            param="state_dir",
        )
    for number in range(version, len(_MIGRATIONS)):
        connection.executescript(f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
    return connection
