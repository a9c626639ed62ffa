"""Files too large for one request: announced, sent in parts, put together."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from sqlite3 import Connection

from coserve.errors import FailedPrecondition, InvalidRequest, NotFound
from coserve.server import upload_store
from coserve.server.application.files import Files, check_purpose, keep_seconds, upload_limit
from coserve.server.auth import Key, owns, tenant_of
from coserve.server.database import Database
from coserve.server.fields import Fields
from coserve.server.file_store import FileRow
from coserve.server.state_dir import StateDir
from coserve.server.upload_store import PartRow, UploadRow

MAX_BYTES = 8 * 2**30
MAX_PART_BYTES = 64 * 2**20
LIFETIME = 3600  # seconds from the announcement to the last part
_COPY_BYTES = 1 << 20
_FIELDS = frozenset({"bytes", "filename", "mime_type", "purpose", "expires_after"})


class Uploads:
    """The uploads of one server. Who asks is a `key`: uploads of other tenants are unknown to it."""

    def __init__(self, database: Database, state: StateDir, files: Files) -> None:
        self._database = database
        self._state = state
        self._files = files

    @property
    def folder(self) -> Path:
        """Where parts are received, under temporary names."""
        return self._state.uploads

    async def restore(self) -> None:
        """Remove the parts of uploads that have ended."""

        def still_pending(db: Connection) -> set[str]:
            upload_store.expire(db, int(time.time()))
            return upload_store.pending(db)

        known = await self._database.run(still_pending)
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in known:
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def create(self, fields: Fields, key: Key | None) -> UploadRow:
        """Announce a file; InvalidRequest for a size, a purpose or an expiry that can't be."""
        await self.restore()
        fields.only(_FIELDS, "the upload")
        fields.required_string("mime_type")
        purpose = fields.required_string("purpose")
        check_purpose(purpose)
        if not fields.has("bytes"):
            raise fields.fail("bytes", "is required.")
        now = int(time.time())
        upload = UploadRow(
            id=f"upload_{uuid.uuid4().hex[:24]}",
            filename=fields.required_string("filename"),
            bytes=fields.integer("bytes", None, 1, upload_limit(key, MAX_BYTES)),
            purpose=purpose,
            status=upload_store.PENDING,
            created_at=now,
            expires_at=now + LIFETIME,
            keep_seconds=keep_seconds(fields.object("expires_after")),
            tenant=tenant_of(key),
        )
        (self.folder / upload.id).mkdir()
        await self._database.run(lambda db: upload_store.insert(db, upload))
        return upload

    async def add_part(self, upload_id: str, temporary: Path, key: Key | None) -> PartRow:
        """Take a finished temporary file over as a part.

        Raises NotFound, FailedPrecondition once the upload has ended, InvalidRequest for an empty part.
        """
        await self._pending(upload_id, key)
        part = PartRow(
            f"part_{uuid.uuid4().hex[:24]}", upload_id, temporary.stat().st_size, int(time.time())
        )
        if part.bytes == 0:
            raise InvalidRequest("The part is empty.", param="data")
        try:
            os.rename(temporary, self._part(part))
        except FileNotFoundError:  # the upload has ended meanwhile
            await self._pending(upload_id, key)
            raise
        await self._database.run(lambda db: upload_store.add_part(db, part))
        return part

    async def complete(
        self, upload_id: str, part_ids: Sequence[str], md5: str, key: Key | None
    ) -> tuple[UploadRow, FileRow]:
        """Put the parts together in this order, as a file.

        Raises NotFound, FailedPrecondition when the upload has ended, InvalidRequest for parts that are
        unknown, given twice, not of the size announced, or of another checksum (`md5`, hex, unless empty).
        """
        upload = await self._pending(upload_id, key)
        known = await self._database.run(lambda db: upload_store.parts(db, upload_id))
        for place, name in enumerate(part_ids):
            if name not in known or name in part_ids[:place]:
                reason = "is no part of this upload" if name not in known else "is given twice"
                raise InvalidRequest(f"part_ids[{place}] {reason}: {name[:100]!r}.", param="part_ids")
        size = sum(known[name].bytes for name in part_ids)
        if size != upload.bytes:
            raise InvalidRequest(
                f"The parts have {size} bytes, {upload.bytes} were announced.", param="part_ids"
            )
        temporary = self._files.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            paths = [self._part(known[name]) for name in part_ids]
            digest = await asyncio.to_thread(_join, paths, temporary)
            if md5 and md5.lower() != digest:
                raise InvalidRequest(f"The bytes have the MD5 {digest}, not the one given.", param="md5")
            file = await self._files.add(
                temporary, upload.filename, upload.purpose, upload.tenant, upload.keep_seconds
            )
        finally:
            temporary.unlink(missing_ok=True)
        return await self._end(upload_id, upload_store.COMPLETED, file.id), file

    async def cancel(self, upload_id: str, key: Key | None) -> UploadRow:
        """End an upload; NotFound, FailedPrecondition when it has ended."""
        await self._pending(upload_id, key)
        return await self._end(upload_id, upload_store.CANCELLED)

    async def _pending(self, upload_id: str, key: Key | None) -> UploadRow:
        def read(db: Connection) -> UploadRow | None:
            upload_store.expire(db, int(time.time()))
            return upload_store.get(db, upload_id)

        upload = await self._database.run(read)
        if upload is None or not owns(key, upload.tenant):
            raise NotFound(f"There is no upload {upload_id[:100]!r}.", param="upload_id")
        if upload.status != upload_store.PENDING:
            raise FailedPrecondition(f"The upload is {upload.status}; begin a new one.", param="upload_id")
        return upload

    async def _end(self, upload_id: str, status: str, file_id: str | None = None) -> UploadRow:
        def record(db: Connection) -> UploadRow | None:
            upload_store.end(db, upload_id, status, file_id)
            return upload_store.get(db, upload_id)

        ended = await self._database.run(record)
        await asyncio.to_thread(shutil.rmtree, self.folder / upload_id, ignore_errors=True)
        assert ended is not None
        return ended

    def _part(self, part: PartRow) -> Path:
        return self.folder / part.upload_id / part.id


def _join(parts: Sequence[Path], target: Path) -> str:
    """Write the parts one after the other; returns the MD5 (hex) of the whole, the checksum clients send."""
    digest = hashlib.md5(usedforsecurity=False)
    with target.open("wb") as whole:
        for path in parts:
            with path.open("rb") as part:
                while data := part.read(_COPY_BYTES):
                    digest.update(data)
                    whole.write(data)
    return digest.hexdigest()
