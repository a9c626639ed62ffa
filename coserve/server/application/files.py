"""Uploaded files: durable before they are known by an id."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from sqlite3 import Connection
from typing import TypeVar

from coserve.errors import InvalidRequest, NotFound, PayloadTooLarge
from coserve.server import file_store
from coserve.server.auth import Key, owns
from coserve.server.database import Database
from coserve.server.fields import Fields
from coserve.server.file_store import FileRow
from coserve.server.state_dir import StateDir, sync_directory

MAX_UPLOAD_BYTES = 512 * 2**20
PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals", "fine-tune-results")
KEEP_SECONDS = (3600, 2_592_000)  # an hour to thirty days
RESULTS = "fine-tune-results"
_T = TypeVar("_T")


class Files:
    """The files of one server. Who asks is a `key`: files of other tenants are unknown to it."""

    def __init__(self, database: Database, state: StateDir) -> None:
        self._database = database
        self._state = state

    @property
    def folder(self) -> Path:
        """Where uploads are written to, under temporary names."""
        return self._state.files

    def path(self, file_id: str) -> Path:
        """Where a known file's bytes are."""
        return self._state.files / file_id

    async def restore(self) -> None:
        """Remove bytes that no row names (uploads cut short after their rename), and what has expired."""
        await self._expire()
        known = {
            file.id for file in await self._database.run(lambda db: file_store.all_files(db, None, False))
        }
        for path in self._state.files.iterdir():
            if path.name not in known:
                path.unlink()

    async def add(
        self, temporary: Path, filename: str, purpose: str | None, tenant: str, keep: int | None = None
    ) -> FileRow:
        """Take a finished temporary file over as one of `tenant`'s, for `keep` seconds (None: until it is
        deleted).

        Raises InvalidRequest for an empty one or an unknown purpose.
        """
        purpose = check_purpose(purpose)
        size = temporary.stat().st_size
        if size == 0:
            raise InvalidRequest("The file is empty.", param="file")
        name = PureWindowsPath(filename).name[:255] or "upload"
        now = int(time.time())
        expires_at = now + keep if keep is not None else None
        file = FileRow(f"file-{uuid.uuid4().hex[:24]}", name, size, purpose, now, expires_at, tenant)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.rename(temporary, self.path(file.id))
        sync_directory(self._state.files)
        await self._database.run(lambda db: file_store.insert(db, file))
        return file

    async def add_bytes(self, data: bytes, filename: str, purpose: str, tenant: str) -> FileRow:
        """Keep a file that the server made."""
        temporary = self._state.files / f"{uuid.uuid4().hex}.tmp"
        temporary.write_bytes(data)
        return await self.add(temporary, filename, purpose, tenant)

    async def get(self, file_id: str, key: Key | None, param: str | None = "file_id") -> FileRow:
        """A file by id; NotFound."""
        await self._expire()
        file = await self._database.run(lambda db: file_store.get(db, file_id))
        if file is None or not owns(key, file.tenant):
            raise NotFound(f"There is no file {file_id[:100]!r}.", param=param, code="file_not_found")
        return file

    async def list(self, purpose: str | None, newest_first: bool, key: Key | None) -> list[FileRow]:
        """All files (of a purpose)."""
        await self._expire()
        found = await self._database.run(lambda db: file_store.all_files(db, purpose, newest_first))
        return [file for file in found if owns(key, file.tenant)]

    async def delete(self, file_id: str, key: Key | None) -> None:
        """Delete a file; jobs that read it already have their own copy of its tokens."""
        await self.get(file_id, key)
        await self._database.run(lambda db: file_store.delete(db, file_id))
        self.path(file_id).unlink(missing_ok=True)

    async def _expire(self) -> None:
        """Delete what has been kept for as long as it was to be."""
        now = int(time.time())

        def remove(db: Connection) -> Sequence[str]:
            gone = file_store.expired(db, now)
            for file_id in gone:
                file_store.delete(db, file_id)
            return gone

        for file_id in await self._database.run(remove):
            self.path(file_id).unlink(missing_ok=True)


def upload_limit(key: Key | None, most: int = MAX_UPLOAD_BYTES) -> int:
    """How many bytes one upload of `key` may have, at `most` so many."""
    own = key.max_upload_bytes if key is not None else 0
    return min(own, most) if own else most


def check_purpose(purpose: str | None) -> str:
    """A purpose that files may have; InvalidRequest for another."""
    if purpose not in PURPOSES:
        raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}.", param="purpose")
    return purpose


def keep_seconds(fields: Fields | None) -> int | None:
    """`expires_after`: how long a file is kept from its creation."""
    if fields is None:
        return None
    fields.only(frozenset({"anchor", "seconds"}), "expires_after")
    fields.choice("anchor", ("created_at",), "created_at")
    seconds = fields.integer("seconds", None, *KEEP_SECONDS)
    if seconds is None:
        raise fields.fail("seconds", "is required.")
    return seconds


class UploadWriter:
    """A temporary file that grows chunk by chunk up to a limit."""

    def __init__(self, folder: Path, limit: int = MAX_UPLOAD_BYTES) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.tmp"
        self._file = self.path.open("wb")
        self._left = limit
        self._limit = limit

    def write(self, data: bytes) -> None:
        """Append; PayloadTooLarge past the limit."""
        self._left -= len(data)
        if self._left < 0:
            raise PayloadTooLarge(f"The file is over the limit of {self._limit} bytes.", param="file")
        self._file.write(data)

    def close(self) -> Path:
        """Finish writing."""
        self._file.close()
        return self.path

    def discard(self) -> None:
        """Close, and remove the file if nobody took it over."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def page(items: Sequence[_T], ids: Sequence[str], after: str | None, limit: int) -> tuple[Sequence[_T], bool]:
    """(one page after the item `after`, whether more follow); InvalidRequest for an unknown `after`."""
    start = 0
    if after is not None:
        if after not in ids:
            raise InvalidRequest(f"after names nothing in this list: {after[:100]!r}.", param="after")
        start = ids.index(after) + 1
    return items[start : start + limit], len(items) > start + limit
