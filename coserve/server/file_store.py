"""Rows of uploaded files. All functions run inside a `Database` transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True)
class FileRow:
    """An uploaded file, or one a job made; the bytes lie under the state directory by `id`. It is there until
    `expires_at` (None: until it is deleted). `tenant` is whose it is, empty on a
    server without keys."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    expires_at: int | None = None
    tenant: str = ""


def _row(row: sqlite3.Row) -> FileRow:
    return FileRow(**{name: row[name] for name in FileRow.__dataclass_fields__})


def insert(connection: sqlite3.Connection, file: FileRow) -> None:
    """Add a file."""
    connection.execute(
        "INSERT INTO files (id, filename, bytes, purpose, created_at, expires_at, tenant)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (file.id, file.filename, file.bytes, file.purpose, file.created_at, file.expires_at, file.tenant),
    )


def get(connection: sqlite3.Connection, file_id: str) -> FileRow | None:
    """A file by its id."""
    row = connection.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
    return _row(row) if row else None


def all_files(connection: sqlite3.Connection, purpose: str | None, newest_first: bool) -> list[FileRow]:
    """All files (of a purpose) in order of creation."""
    order = "DESC" if newest_first else "ASC"
    where, values = ("WHERE purpose = ?", (purpose,)) if purpose else ("", ())
    rows = connection.execute(
        f"SELECT * FROM files {where} ORDER BY created_at {order}, rowid {order}", values
    )
    return [_row(row) for row in rows]


def expired(connection: sqlite3.Connection, now: int) -> list[str]:
    """Ids of the files whose time is over."""
    return [row["id"] for row in connection.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))]


def delete(connection: sqlite3.Connection, file_id: str) -> bool:
    """Forget a file; False when there was none."""
    return connection.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0
