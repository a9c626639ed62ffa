"""Adapters: loading, publishing, rolling back, removing. What their names mean is in `adapter_names`.

Every version lies as files of its own under the state directory, so nobody outside can change what was
checked; those of a job's checkpoint, which nobody writes to any more, are linked. Order of a publication:
files durable, row committed, engine loaded, pointer swapped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from coserve.engine.client import EngineClient
from coserve.errors import (
    ConfigError,
    CoserveError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from coserve.log import line
from coserve.lora.peft_files import CONFIG_FILE, TENSOR_FILE, read_adapter_info
from coserve.lora.registry import AdapterVersion
from coserve.metrics import Metrics
from coserve.models.config import ModelConfig
from coserve.server import adapter_store
from coserve.server.adapter_store import AdapterRow
from coserve.server.application.adapter_names import AdapterNames, ref
from coserve.server.application.archives import extract
from coserve.server.application.generation import Generator
from coserve.server.application.models import BaseModel
from coserve.server.auth import Key, sees
from coserve.server.database import Database
from coserve.server.state_dir import StateDir, copy_directory

logger = logging.getLogger(__name__)

_PEFT_FILES = (CONFIG_FILE, TENSOR_FILE, "README.md")


class Adapters(AdapterNames):
    """The adapters of one server: what their names mean, and every change of it."""

    def __init__(
        self,
        *,
        base: BaseModel,
        model_config: ModelConfig,
        engine: EngineClient,
        database: Database,
        state: StateDir,
        generator: Generator,
        metrics: Metrics,
        max_rank: int,
        roots: Sequence[str],
        serves_live: bool = False,
    ) -> None:
        super().__init__(base, metrics, serves_live)
        self._model_config = model_config
        self._engine = engine
        self._database = database
        self._state = state
        self._generator = generator
        self._max_rank = max_rank
        self._roots = [Path(root).expanduser().resolve() for root in roots]
        self._lock = asyncio.Lock()
        self._removals: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ starting

    async def restore(self) -> None:
        """Read the rows, and discard version folders that no row points to (publications cut short)."""
        rows = await self._database.run(adapter_store.all_rows)
        currents = await self._database.run(adapter_store.currents)
        for row in rows:
            version = row.version
            self._rows[version.name, version.version] = row
            if row.listed:
                self._registry.publish(version, make_current=version.version == currents.get(version.name))
        kept = {Path(row.version.path) for row in rows}
        for folder in self._state.adapters.glob("*/*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        self._count()

    async def load_pinned(self) -> None:
        """Bring pinned versions to a fresh engine; the others come when they are asked for."""
        for version in self._registry.all_versions():
            if version.pinned:
                with contextlib.suppress(Unavailable):
                    await self._engine.load_adapter(ref(version), True)

    async def load_at_start(self, name: str, path: str) -> None:
        """An adapter of `--lora-modules`: a new version unless its files are those of the current one.

        Raises ConfigError.
        """
        try:
            source = Path(path).expanduser()
            info = await asyncio.to_thread(read_adapter_info, source, self._model_config, self._max_rank)
            if self.knows(name) and self._registry.get(name).digest == info.digest:
                return
            await self.load(name, path, pinned=False, replace_existing=True, key=None, trusted=True)
        except CoserveError as error:
            raise ConfigError(
                f"--lora-modules {name}={path}: {error.message}", param="lora_modules"
            ) from None

    # ------------------------------------------------------------------ checkpoints

    async def drop_checkpoint(self, names: Sequence[str]) -> None:
        """Forget a checkpoint's names and free its weights."""
        gone = {name: self._checkpoints.pop(name, None) for name in names}
        for digest in {found.reference.digest for found in gone.values() if found is not None}:
            await self._release(digest)

    # ------------------------------------------------------------------ changing

    async def load(
        self,
        name: str,
        path: str,
        *,
        pinned: bool,
        replace_existing: bool,
        key: Key | None,
        trusted: bool = False,
    ) -> AdapterRow:
        """Load an adapter from a directory of the server's, or bring an unloaded name back (no `path`).

        `trusted` paths come from the command line; others must lie under --adapter-root. Raises
        FailedPrecondition for a name in service without `replace_existing`, NotFound, InvalidRequest.
        """
        self.check_name(name, "lora_name", key)
        async with self._lock:
            if self.knows(name) and not replace_existing:
                raise FailedPrecondition(
                    f"The adapter {name!r} is loaded already; unload it first, or replace it.",
                    param="lora_name",
                )
            if not path:
                return await self._list_again(name)
            source = Path(path).expanduser()
            source = source.resolve() if trusted else self._allowed(source)
            return await self._publish(name, source, root=path, origin="load", pinned=pinned)

    def _allowed(self, path: Path) -> Path:
        resolved = path.resolve()
        if not any(resolved.is_relative_to(root) for root in self._roots):
            raise InvalidRequest(
                "This path is not under an --adapter-root of the server.",
                param="lora_path",
                code="path_not_allowed",
            )
        if not resolved.is_dir():
            raise NotFound("There is no adapter directory at this path.", param="lora_path")
        return resolved

    async def _list_again(self, name: str) -> AdapterRow:
        rows = [row for row in self._rows.values() if row.version.name == name]
        if not rows:
            raise InvalidRequest("A path is required: no such adapter was here before.", param="lora_path")
        currents = await self._database.run(adapter_store.currents)
        current = next((row for row in rows if row.version.version == currents.get(name)), rows[-1])
        await self._engine.load_adapter(ref(current.version), current.version.pinned)
        await self._database.run(lambda db: adapter_store.set_listed(db, name, True))
        for row in rows:
            listed = replace(row, listed=True)
            self._rows[name, row.version.version] = listed
            if not self._in_service(row.version):
                self._registry.publish(row.version, make_current=row is current)
        self._count()
        return self._rows[name, current.version.version]

    async def upload(self, name: str, archive: Path, limit: int, key: Key | None) -> AdapterRow:
        """Make a version of an uploaded tar or zip."""
        self.check_name(name, "name", key)
        folder = self._state.root / f"upload-{uuid.uuid4().hex}.tmp"
        try:
            await asyncio.to_thread(extract, archive, folder, limit)
            async with self._lock:
                return await self._publish(name, folder, root=f"upload:{name}", origin="upload")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def publish(
        self, name: str, source: Path, *, job_id: str, origin: str = "checkpoint"
    ) -> AdapterRow:
        """Make a version of a job's checkpoint; `origin` "job" for the one its success publishes."""
        async with self._lock:
            with self._metrics.publish_seconds.time():
                return await self._publish(name, source, root=job_id, origin=origin, job_id=job_id)

    async def _publish(
        self, name: str, source: Path, *, root: str, origin: str, job_id: str = "", pinned: bool = False
    ) -> AdapterRow:
        if not job_id:  # from outside
            param = "lora_path" if origin == "load" else "file"
            await asyncio.to_thread(
                read_adapter_info, source, self._model_config, self._max_rank, param=param
            )
        elif not source.is_dir():
            raise NotFound("The checkpoint's files are gone.", param="checkpoint")
        number = await self._database.run(lambda db: adapter_store.next_version(db, name))
        folder = self._state.adapter(name, number)
        await asyncio.to_thread(copy_directory, source, folder, _PEFT_FILES, link=bool(job_id))
        try:
            row = await self._row_of(name, number, folder, root, origin, job_id, pinned)
            if origin != "job":
                await self._engine.load_adapter(ref(row.version), pinned)
            await self._database.run(lambda db: adapter_store.insert(db, row))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if origin == "job":
            await self._load_published(row)
        self._rows[name, number] = row
        self._registry.publish(row.version)
        self._count()
        rank = row.version.rank
        logger.info(line("adapter published", name=name, version=number, origin=origin, rank=rank))
        return row

    async def _row_of(
        self,
        name: str,
        number: int,
        folder: Path,
        root: str,
        origin: str,
        job_id: str,
        pinned: bool,
    ) -> AdapterRow:
        # The copy is what will be served, so the copy's digest is the one that counts.
        copied = await asyncio.to_thread(read_adapter_info, folder, self._model_config, self._max_rank)
        version = AdapterVersion(
            name=name,
            version=number,
            digest=copied.digest,
            path=str(folder),
            rank=copied.rank,
            created_at=int(time.time()),
            job_id=job_id,
            pinned=pinned,
        )
        return AdapterRow(version, root=root, origin=origin, listed=True)

    async def _load_published(self, row: AdapterRow) -> None:
        """The row stands already: an engine that is away loads the version when it is asked for."""
        try:
            await self._engine.load_adapter(ref(row.version), row.version.pinned, row.version.job_id)
        except CoserveError as error:
            logger.warning(
                line("adapter will be loaded on demand", name=row.version.name, reason=error.message)
            )

    async def rollback(self, name: str, version: int, key: Key | None) -> AdapterRow:
        """Point `name` at an earlier version; 0 is the one before the current."""
        async with self._lock:
            current = self.get(name, key=key).version
            if not version:
                earlier = [v.version for v in self._registry.versions(name) if v.version < current.version]
                if not earlier:
                    raise FailedPrecondition(f"The adapter {name!r} has no earlier version.", param="version")
                version = max(earlier)
            row = self.get(name, version, key=key)
            await self._engine.load_adapter(ref(row.version), row.version.pinned)
            await self._database.run(lambda db: adapter_store.set_current(db, name, version))
            self._registry.rollback(name, version)
            return row

    async def unload(self, name: str, key: Key | None) -> None:
        """Take a name out of service. Files of a loaded one go; trained and uploaded ones can come back."""
        async with self._lock:
            self.get(name, key=key)
            self.check_unaliased(name)
            rows = [row for row in self._rows.values() if row.version.name == name]
            self._registry.remove(name)
            await self._database.run(lambda db: adapter_store.set_listed(db, name, False))
            for row in rows:
                self._rows[name, row.version.version] = replace(row, listed=False)
            await self._retire(rows, [row for row in rows if row.origin == "load"])

    async def delete(self, name: str, key: Key | None) -> None:
        """Delete an adapter ("name": all versions; "name@3": one) with its files."""
        if self.is_base(name) and sees(key, self._base.name):
            raise InvalidRequest("The base model can't be deleted.", param="model")
        async with self._lock:
            found = self.get(name, key=key).version
            number = found.version if "@" in name else 0
            is_last = len(self._registry.versions(found.name)) == 1
            self.check_unaliased(found.name, 0 if is_last else number)
            gone = self._registry.remove(found.name, number)
            rows = [self._rows[version.name, version.version] for version in gone]
            if number and self.knows(found.name):
                current = self._registry.get(found.name).version
                await self._database.run(lambda db: adapter_store.set_current(db, found.name, current))
            await self._retire(rows, rows)

    async def _retire(self, rows: list[AdapterRow], forget: list[AdapterRow]) -> None:
        """Free the weights of `rows`; rows and files of `forget` go, the files after their last reader."""

        for row in forget:
            version = row.version
            del self._rows[version.name, version.version]
            await self._database.run(self._deletion(version))
        for row in rows:
            await self._release(row.version.digest)
        self._count()
        for row in forget:
            task = asyncio.create_task(self._delete_files(row.version))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

    @staticmethod
    def _deletion(version: AdapterVersion) -> Callable[[object], None]:
        return lambda db: adapter_store.delete(db, version.name, version.version)  # type: ignore[arg-type]

    async def _release(self, digest: str) -> None:
        held = {version.digest for version in self._registry.all_versions()}
        held |= {checkpoint.reference.digest for checkpoint in self._checkpoints.values()}
        if digest in held:
            return
        with contextlib.suppress(Unavailable, NotFound):
            await self._engine.unload_adapter(digest)

    async def _delete_files(self, version: AdapterVersion) -> None:
        await self._generator.unused(version.digest)
        folder = Path(version.path)
        await asyncio.to_thread(shutil.rmtree, folder, True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
