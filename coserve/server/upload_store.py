"""Rows of uploads that come in parts. All functions run inside a `Database` transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

PENDING, COMPLETED, CANCELLED, EXPIRED = "pending", "completed", "cancelled", "expired"


@dataclass(frozen=True)
class UploadRow:
    """A file that is announced with its size and comes in parts until `expires_at`. `keep_seconds` is how
    long the file will be kept (None: until it is deleted); `file_id` is set once it is there, `tenant` is
    whose it is."""

    id: str
    filename: str
    bytes: int
    purpose: str
    status: str
    created_at: int
    expires_at: int
    keep_seconds: int | None = None
    file_id: str | None = None
    tenant: str = ""


@dataclass(frozen=True)
class PartRow:
    """One part; its bytes lie under the state directory by upload and `id`."""

    id: str
    upload_id: str
    bytes: int
    created_at: int


def insert(connection: sqlite3.Connection, upload: UploadRow) -> None:
    """Add an upload."""
    connection.execute(
        "INSERT INTO uploads (id, filename, bytes, purpose, status, created_at, expires_at, keep_seconds,"
        " tenant) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(upload.id, upload.filename, upload.bytes, upload.purpose, upload.status, upload.created_at),
            *(upload.expires_at, upload.keep_seconds, upload.tenant),
        ),
    )


def get(connection: sqlite3.Connection, upload_id: str) -> UploadRow | None:
    """An upload by its id."""
    row = connection.execute("SELECT * FROM uploads WHERE id = ?", (upload_id,)).fetchone()
    return _upload(row) if row else None


def expire(connection: sqlite3.Connection, now: int) -> None:
    """End what is pending past its time."""
    connection.execute(
        "UPDATE uploads SET status = ? WHERE status = ? AND expires_at <= ?", (EXPIRED, PENDING, now)
    )


def pending(connection: sqlite3.Connection) -> set[str]:
    """Ids of the uploads that parts may still be added to."""
    rows = connection.execute("SELECT id FROM uploads WHERE status = ?", (PENDING,))
    return {row["id"] for row in rows}


def end(connection: sqlite3.Connection, upload_id: str, status: str, file_id: str | None = None) -> None:
    """No part is added any more."""
    connection.execute(
        "UPDATE uploads SET status = ?, file_id = ? WHERE id = ?", (status, file_id, upload_id)
    )
    connection.execute("DELETE FROM upload_parts WHERE upload_id = ?", (upload_id,))


def add_part(connection: sqlite3.Connection, part: PartRow) -> None:
    """Add a part."""
    connection.execute(
        "INSERT INTO upload_parts (id, upload_id, bytes, created_at) VALUES (?, ?, ?, ?)",
        (part.id, part.upload_id, part.bytes, part.created_at),
    )


def parts(connection: sqlite3.Connection, upload_id: str) -> dict[str, PartRow]:
    """An upload's parts by id."""
    rows = connection.execute("SELECT * FROM upload_parts WHERE upload_id = ?", (upload_id,))
    return {row["id"]: PartRow(**{name: row[name] for name in PartRow.__dataclass_fields__}) for row in rows}


def _upload(row: sqlite3.Row) -> UploadRow:
    return UploadRow(**{name: row[name] for name in UploadRow.__dataclass_fields__})
