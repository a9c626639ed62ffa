"""Rows of adapter versions. All functions run inside a `Database` transaction."""

from __future__ import annotations

import sqlite3
import sys
from dataclasses import dataclass

from coserve.lora.registry import AdapterVersion


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """A version as it is kept: `root` is what /v1/models shows as its origin (a path or a job), `origin` is
    "load", "upload" or "job", `listed` False once it was unloaded."""

    version: AdapterVersion
    root: str
    origin: str
    listed: bool


def _row(row: sqlite3.Row) -> AdapterRow:
    version = AdapterVersion(
        name=row["name"],
        version=row["version"],
        digest=row["digest"],
        path=row["path"],
        rank=row["rank"],
        created_at=row["created_at"],
        job_id=row["job_id"] or "",
        pinned=bool(row["pinned"]),
    )
    return AdapterRow(version, row["root"], sys.intern(row["origin"]), bool(row["listed"]))


def listed_rows(connection: sqlite3.Connection) -> list[AdapterRow]:
    """Every version in service, by name and number."""
    found = connection.execute("SELECT * FROM adapter_versions WHERE listed ORDER BY name, version")
    return [_row(row) for row in found]


def of_name(connection: sqlite3.Connection, name: str) -> list[AdapterRow]:
    """All versions of a name, in service or not, by number."""
    found = connection.execute("SELECT * FROM adapter_versions WHERE name = ? ORDER BY version", (name,))
    return [_row(row) for row in found]


def paths(connection: sqlite3.Connection) -> set[str]:
    """The folders of all versions, in service or not."""
    return {row["path"] for row in connection.execute("SELECT path FROM adapter_versions")}


def currents(connection: sqlite3.Connection) -> dict[str, int]:
    """Which version each name means."""
    return {row["name"]: row["current"] for row in connection.execute("SELECT * FROM adapter_names")}


def next_version(connection: sqlite3.Connection, name: str) -> int:
    """One more than the largest number the name has ever had."""
    row = connection.execute("SELECT highest FROM adapter_names WHERE name = ?", (name,)).fetchone()
    return row["highest"] + 1 if row else 1


def insert(connection: sqlite3.Connection, row: AdapterRow) -> None:
    """Add a version and make it its name's current one."""
    version = row.version
    connection.execute(
        "INSERT INTO adapter_versions (name, version, digest, path, root, origin, rank, job_id, listed,"
        " pinned, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(
                version.name,
                version.version,
                version.digest,
                version.path,
                row.root,
                row.origin,
                version.rank,
            ),
            *(version.job_id or None, int(row.listed), int(version.pinned), version.created_at),
        ),
    )
    connection.execute(
        "INSERT INTO adapter_names (name, current, highest) VALUES (?1, ?2, ?2) "
        "ON CONFLICT (name) DO UPDATE SET current = ?2, highest = max(highest, ?2)",
        (version.name, version.version),
    )


def set_current(connection: sqlite3.Connection, name: str, version: int) -> None:
    """Point a name at another of its versions."""
    connection.execute("UPDATE adapter_names SET current = ? WHERE name = ?", (version, name))


def set_listed(connection: sqlite3.Connection, name: str, listed: bool, version: int = 0) -> None:
    """Take a name, or one version of it, out of service, or back in."""
    connection.execute(
        "UPDATE adapter_versions SET listed = ?1 WHERE name = ?2 AND (?3 = 0 OR version = ?3)",
        (int(listed), name, version),
    )


def set_pinned(connection: sqlite3.Connection, name: str, version: int, pinned: bool) -> None:
    """Keep a version on the device, or no longer."""
    connection.execute(
        "UPDATE adapter_versions SET pinned = ? WHERE name = ? AND version = ?", (int(pinned), name, version)
    )


def delete(connection: sqlite3.Connection, name: str, version: int) -> None:
    """Forget a version; its number is never given again."""
    connection.execute("DELETE FROM adapter_versions WHERE name = ? AND version = ?", (name, version))


def of_job(connection: sqlite3.Connection, job_id: str) -> AdapterRow | None:
    """The version that a job's success published, or None."""
    row = connection.execute(
        "SELECT * FROM adapter_versions WHERE job_id = ? AND origin = 'job' ORDER BY version LIMIT 1",
        (job_id,),
    ).fetchone()
    return _row(row) if row else None
