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
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from coserve.config import LoraModule
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
from coserve.server.application.adapter_files import allowed_directory, fetch
from coserve.server.application.adapter_names import AdapterNames, ref
from coserve.server.application.archives import check_digest, extract, tar_chunks
from coserve.server.application.files import MAX_UPLOAD_BYTES
from coserve.server.application.generation import Generator
from coserve.server.application.models import BaseModel
from coserve.server.auth import Key, sees
from coserve.server.database import Database
from coserve.server.state_dir import StateDir, copy_directory

logger = logging.getLogger(__name__)

_AT_ONCE = 8  # adapters that are read at the start
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
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._removals: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ starting

    async def restore(self) -> None:
        """Read the rows in service, and discard version folders that no row points to (publications cut
        short)."""
        rows = await self._database.run(adapter_store.listed_rows)
        currents = await self._database.run(adapter_store.currents)
        for row in rows:
            version = row.version
            self._rows[version.name, version.version] = row
            self._registry.publish(version, make_current=version.version == currents.get(version.name))
        kept = await self._database.run(adapter_store.paths)
        await asyncio.to_thread(self._state.keep_adapters, kept)
        self._count()

    async def load_pinned(self) -> None:
        """Bring pinned versions to a fresh engine; the others come when they are asked for."""
        for version in self._registry.all_versions():
            if version.pinned:
                try:
                    await self._engine.load_adapter(ref(version), True)
                except Unavailable:
                    return  # it has died again; whoever brings it up calls again
                except CoserveError as error:
                    logger.warning(line("adapter isn't pinned", name=version.name, reason=error.message))

    async def load_at_start(self, modules: Sequence[LoraModule]) -> None:
        """The adapters of `--lora-modules`, some at a time: a new version of each whose files aren't those of
        the current one.

        Raises ConfigError.
        """
        for start in range(0, len(modules), _AT_ONCE):
            loads = [self._load_module(module) for module in modules[start : start + _AT_ONCE]]
            for failure in await asyncio.gather(*loads, return_exceptions=True):
                if failure is not None:
                    raise failure

    async def _load_module(self, module: LoraModule) -> None:
        name, path, pinned = module.name, module.path, module.pinned
        try:
            source = Path(path).expanduser()
            info = await asyncio.to_thread(read_adapter_info, source, self._model_config, self._max_rank)
            if self.knows(name) and self._registry.get(name).digest == info.digest:
                if pinned:
                    await self._pin(self._registry.get(name), True)
                return
            await self.load(name, path, pinned=pinned, replace_existing=True, key=None, trusted=True)
        except CoserveError as error:
            raise ConfigError(
                f"--lora-modules {name}={path}: {error.message}", param="lora_modules"
            ) from None

    async def archive(self, row: AdapterRow) -> AsyncIterator[bytes]:
        """A tar of a version's PEFT directory, read in a thread; its files stay until the end."""
        async with self._generator.using(row.version.path):
            chunks = tar_chunks(Path(row.version.path))
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk

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
        pinned: bool | None,
        replace_existing: bool,
        key: Key | None,
        trusted: bool = False,
    ) -> AdapterRow:
        """Load an adapter from a directory of the server's; without a `path` bring an unloaded name back, or
        pin or unpin one in service.

        `trusted` paths come from the command line; others must lie under --adapter-root. `pinned` keeps it on
        the device; None: if the version that it replaces is. Raises FailedPrecondition for a name in
        service without `replace_existing` and for more pins than there are places, NotFound, InvalidRequest.
        """
        self.check_name(name, "lora_name", key)
        async with self._locked(name):
            if not path and pinned is not None and self.knows(name):
                await self._pin(self.get(name, key=key).version, pinned)
                return self.get(name, key=key)
            if self.knows(name) and not replace_existing:
                raise FailedPrecondition(
                    f"The adapter {name!r} is loaded already; unload it first, or replace it.",
                    param="lora_name",
                )
            if not path:
                return await self._list_again(name, pinned)
            if trusted:
                source = Path(path).expanduser().resolve()
                return await self._publish(name, source, root=path, origin="load", pinned=pinned)
            source = allowed_directory(path, self._roots)
            folder = self._state.root / f"load-{uuid.uuid4().hex}.tmp"
            try:
                await asyncio.to_thread(fetch, source, folder, _PEFT_FILES, self._roots, MAX_UPLOAD_BYTES)
                return await self._publish(name, folder, root=path, origin="load", pinned=pinned)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _locked(self, name: str) -> asyncio.Lock:
        """One change of a name at a time; others don't wait for it, nor for its files."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    async def _list_again(self, name: str, pinned: bool | None) -> AdapterRow:
        rows = await self._database.run(lambda db: adapter_store.of_name(db, name))
        if not rows:
            raise InvalidRequest("A path is required: no such adapter was here before.", param="lora_path")
        currents = await self._database.run(adapter_store.currents)
        current = next((row for row in rows if row.version.version == currents.get(name)), rows[-1])
        await self._engine.load_adapter(ref(current.version), bool(pinned))
        await self._database.run(lambda db: adapter_store.set_listed(db, name, True))
        for row in rows:
            version = replace(row.version, pinned=bool(pinned) and row is current)
            self._rows[name, version.version] = replace(row, version=version, listed=True)
            if not self._in_service(version):
                self._registry.publish(version, make_current=row is current)
        self._count()
        if pinned:
            await self._pin(self._registry.get(name), True)
        return self._rows[name, current.version.version]

    async def upload(
        self,
        name: str,
        archive: Path,
        limit: int,
        key: Key | None,
        *,
        pinned: bool | None = None,
        sha256: str = "",
    ) -> AdapterRow:
        """Make a version of an uploaded tar or zip, whose own digest `sha256` (hex) is, where it is given."""
        self.check_name(name, "name", key)
        folder = self._state.root / f"upload-{uuid.uuid4().hex}.tmp"
        try:
            if sha256:
                await asyncio.to_thread(check_digest, archive, sha256)
            await asyncio.to_thread(extract, archive, folder, limit)
            async with self._locked(name):
                root = f"upload:{name}"
                return await self._publish(name, folder, root=root, origin="upload", pinned=pinned)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def publish(
        self, name: str, source: Path, *, job_id: str, origin: str = "checkpoint"
    ) -> AdapterRow:
        """Make a version of a job's checkpoint; `origin` "job" for the one its success publishes."""
        async with self._locked(name):
            with self._metrics.publish_seconds.time():
                return await self._publish(name, source, root=job_id, origin=origin, job_id=job_id)

    async def _publish(
        self, name: str, source: Path, *, root: str, origin: str, job_id: str = "", pinned: bool | None = None
    ) -> AdapterRow:
        if not job_id:  # from outside
            param = "lora_path" if origin == "load" else "file"
            await asyncio.to_thread(
                read_adapter_info, source, self._model_config, self._max_rank, param=param
            )
        elif not source.is_dir():
            raise NotFound("The checkpoint's files are gone.", param="checkpoint")
        earlier = self._registry.get(name) if self.knows(name) else None
        was_pinned = earlier is not None and earlier.pinned
        pinned = was_pinned if pinned is None else pinned
        number = await self._database.run(lambda db: adapter_store.next_version(db, name))
        folder = self._state.adapter(name, number)
        await asyncio.to_thread(copy_directory, source, folder, _PEFT_FILES, link=bool(job_id))
        # A pin that it takes over would be one too many as long as both have it.
        pins_now = pinned and not was_pinned
        try:
            row = await self._row_of(name, number, folder, root, origin, job_id, pins_now)
            if origin != "job":
                await self._engine.load_adapter(ref(row.version), pins_now)
            await self._database.run(lambda db: adapter_store.insert(db, row))
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, True)
            raise
        if origin == "job":
            await self._load_published(row)
        self._rows[name, number] = row
        self._registry.publish(row.version)
        self._count()
        if was_pinned:
            await self._move_pin(earlier, row.version if pinned else None)
        rank = row.version.rank
        logger.info(line("adapter published", name=name, version=number, origin=origin, rank=rank))
        return self._rows[name, number]

    # ------------------------------------------------------------------ pins

    async def _pin(self, version: AdapterVersion, pinned: bool) -> None:
        """Keep a version on the device, or no longer; raises what the engine refuses it for."""
        await self._engine.load_adapter(ref(version), pinned)
        name, number = version.name, version.version
        await self._database.run(lambda db: adapter_store.set_pinned(db, name, number, pinned))
        changed = replace(version, pinned=pinned)
        self._registry.update(changed)
        self._rows[name, number] = replace(self._rows[name, number], version=changed)
        self._count()

    async def _move_pin(self, old: AdapterVersion, new: AdapterVersion | None) -> None:
        """A pin stays with its name: the version that the name means now has it. What serves already doesn't
        fail for it."""
        try:
            await self._pin(old, False)
            if new is not None:
                await self._pin(new, True)
        except CoserveError as error:
            logger.warning(line("adapter isn't pinned", name=old.name, reason=error.message))

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
        async with self._locked(name):
            current = self.get(name, key=key).version
            if not version:
                earlier = [v.version for v in self._registry.versions(name) if v.version < current.version]
                if not earlier:
                    raise FailedPrecondition(f"The adapter {name!r} has no earlier version.", param="version")
                version = max(earlier)
            wanted = self.get(name, version, key=key).version
            await self._engine.load_adapter(ref(wanted), wanted.pinned)
            await self._database.run(lambda db: adapter_store.set_current(db, name, version))
            self._registry.rollback(name, version)
            if current.pinned and wanted.version != current.version:
                await self._move_pin(current, wanted)
            return self._rows[name, version]

    async def unload(self, name: str, key: Key | None, version: int = 0) -> None:
        """Take a name ("name@3" or `version`: one version) out of service. Files of a loaded one go; trained
        and uploaded ones can come back."""
        async with self._locked(name.partition("@")[0]):
            found = self.get(name, version, key=key).version
            rows = await self._withdraw(found, whole="@" not in name and not version)
            for row in rows:
                number = row.version.version
                await self._database.run(
                    lambda db, number=number: adapter_store.set_listed(db, found.name, False, number)
                )
            await self._retire(rows, [row for row in rows if row.origin == "load"])

    async def delete(self, name: str, key: Key | None) -> None:
        """Delete an adapter ("name": all versions; "name@3": one) with its files."""
        if self.is_base(name) and sees(key, self._base.name):
            raise InvalidRequest("The base model can't be deleted.", param="model")
        async with self._locked(name.partition("@")[0]):
            found, whole = self.get(name, key=key).version, "@" not in name
            rows = await self._withdraw(found, whole=whole)
            unlisted = await self._database.run(lambda db: adapter_store.of_name(db, found.name))
            forget = rows + [row for row in unlisted if whole and not row.listed]
            await self._retire(rows, forget)

    async def _withdraw(self, found: AdapterVersion, *, whole: bool) -> list[AdapterRow]:
        """Nobody finds the version, or the whole name, any more; returns what was removed."""
        is_last = len(self._registry.versions(found.name)) == 1
        self.check_unaliased(found.name, 0 if whole or is_last else found.version)
        gone = self._registry.remove(found.name, 0 if whole else found.version)
        rows = [self._rows.pop((version.name, version.version)) for version in gone]
        self._count()
        if self.knows(found.name):
            current = self._registry.get(found.name).version
            await self._database.run(lambda db: adapter_store.set_current(db, found.name, current))
        return rows

    async def _retire(self, rows: list[AdapterRow], forget: list[AdapterRow]) -> None:
        """Free the weights of `rows`; database rows and files of `forget` go, the files after their last
        reader."""
        for row in forget:
            await self._database.run(self._deletion(row.version))
        for digest in {row.version.digest for row in rows}:
            await self._release(digest)
        for row in forget:
            task = asyncio.create_task(self._delete_files(row.version))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

    @staticmethod
    def _deletion(version: AdapterVersion) -> Callable[[object], None]:
        return lambda db: adapter_store.delete(db, version.name, version.version)  # type: ignore[arg-type]

    async def _release(self, digest: str) -> None:
        checkpoints = (checkpoint.reference.digest for checkpoint in self._checkpoints.values())
        if self._registry.of_digest(digest) or digest in checkpoints:
            return
        with contextlib.suppress(Unavailable, NotFound):
            await self._engine.unload_adapter(digest)

    async def _delete_files(self, version: AdapterVersion) -> None:
        await self._generator.unused(version.path)
        folder = Path(version.path)
        await asyncio.to_thread(shutil.rmtree, folder, True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
