"""Training runs and what they have saved: kept across restarts, and answering by their tinker:// paths.

A save's files are durable before its row is, and go after it; a start removes files that no row points to.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from coserve.engine.messages import AdapterRef
from coserve.errors import Conflict, InvalidRequest, NotFound
from coserve.lora.peft_files import read_adapter_info
from coserve.models.config import ModelConfig
from coserve.server.application.adapters import Adapters
from coserve.server.application.generation import Generator
from coserve.server.auth import Key, owns
from coserve.server.database import Database
from coserve.server.state_dir import StateDir
from coserve.server.tinker import store
from coserve.server.tinker.store import Run, Saved

WEIGHTS, SAMPLER = "weights", "sampler_weights"
LEAST_TTL, MOST_TTL = 3600, 10 * 365 * 86400  # seconds
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Runs:
    """Those of one server, by id and by path."""

    def __init__(
        self,
        database: Database,
        state: StateDir,
        adapters: Adapters,
        generator: Generator,
        model_config: ModelConfig,
        max_rank: int,
    ) -> None:
        self._database, self._state, self._adapters = database, state, adapters
        self._generator, self._model_config, self._max_rank = generator, model_config, max_rank
        self._runs: dict[str, Run] = {}
        self._saved: dict[str, Saved] = {}
        self._removals: set[asyncio.Task[None]] = set()

    async def restore(self) -> None:
        """Read the rows; folders without one are removed."""
        runs, saved = await self._database.run(store.everything)
        self._runs = {run.id: run for run in runs}
        for one in saved:
            self._take_in(one)
        kept = {Path(one.folder) for one in saved}
        for folder in self._state.tinker.iterdir():
            if folder not in kept:
                await asyncio.to_thread(shutil.rmtree, folder, True)

    # ------------------------------------------------------------------ reading

    def run(self, run_id: str, key: Key | None) -> Run:
        """One of this key's; NotFound."""
        run = self._runs.get(run_id)
        if run is None or not owns(key, run.tenant):
            raise NotFound(f"There is no training run {run_id[:200]!r}.", param="training_run_id")
        return run

    def of(self, key: Key | None) -> list[Run]:
        """All of this key's, the newest first."""
        return [run for run in self._runs.values() if owns(key, run.tenant)][::-1]

    def saved(self, path: str, key: Key | None, param: str = "path") -> Saved:
        """What this key saved under a path; NotFound, InvalidRequest where it is no path."""
        if not path.startswith("tinker://"):
            raise InvalidRequest(f"{param} must begin with tinker://, not {path[:80]!r}.", param=param)
        found = self._saved.get(path)
        if found is None or not owns(key, found.tenant):
            raise NotFound(f"There are no weights at {path[:300]}.", param=param)
        return found

    def saved_of(self, key: Key | None, run_id: str = "") -> list[Saved]:
        """All that this key saved (in a run), the newest first; without what goes with its session."""
        found = [s for s in self._saved.values() if owns(key, s.tenant) and not s.ephemeral]
        return [s for s in found if not run_id or s.run_id == run_id][::-1]

    def run_of(self, saved: Saved) -> Run:
        """The run that saved it."""
        return self._runs[saved.run_id]

    # ------------------------------------------------------------------ changing

    async def put(self, run: Run) -> None:
        """A new run, or news of one."""
        await self._database.run(lambda db: store.put_run(db, run))
        self._runs[run.id] = run

    def seen(self, run: Run) -> None:
        """Something was asked of it; kept with its next save."""
        self._runs[run.id] = run

    def new_folder(self) -> Path:
        """Where the next save's files go."""
        return self._state.tinker / uuid.uuid4().hex

    @staticmethod
    def check_name(name: str) -> str:
        """A name of a save; InvalidRequest."""
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "path must be a name of at most 128 letters, digits, points, dashes and underscores, and "
                f"begin with a letter or a digit; not {name[:80]!r}.",
                param="path",
            )
        return name

    def check_free(self, run_id: str, kind: str, name: str) -> None:
        """Raise Conflict where a run has saved something under this name."""
        if _path(run_id, kind, name) in self._saved:
            raise Conflict(
                f"There are weights named {name!r}; send overwrite, or another name.", param="path"
            )

    async def add(
        self,
        run_id: str,
        kind: str,
        name: str,
        folder: Path,
        *,
        ttl: int | None = None,
        user_metadata: dict[str, str] | None = None,
        ephemeral: bool = False,
    ) -> Saved:
        """The files in `folder` are there: they answer from now on, in place of what had the name."""
        info = await asyncio.to_thread(read_adapter_info, folder, self._model_config, self._max_rank)
        run, now = self._runs[run_id], time.time()
        saved = Saved(
            path=_path(run_id, kind, name),
            kind=kind,
            name=name,
            run_id=run_id,
            tenant=run.tenant,
            folder=str(folder),
            digest=info.digest,
            size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
            user_metadata=user_metadata,
            ephemeral=ephemeral,
        )
        before = self._saved.get(saved.path)
        if not ephemeral:
            await self._database.run(lambda db: store.put_saved(db, saved))
            await self.put(msgspec.structs.replace(run, seen_at=now))
        if before is not None:
            await self._drop(before)
        self._take_in(saved)
        return saved

    async def set_ttl(self, saved: Saved, ttl: int | None) -> None:
        """When it goes: in so many seconds, or never."""
        changed = msgspec.structs.replace(saved, expires_at=None if ttl is None else time.time() + ttl)
        await self._database.run(lambda db: store.put_saved(db, changed))
        self._saved[saved.path] = changed

    async def delete(self, saved: Saved) -> None:
        """Forget it; its files go after their last reader."""
        if not saved.ephemeral:
            await self._database.run(lambda db: store.delete_saved(db, saved.path))
        if self._saved.pop(saved.path, None) is not None:
            await self._drop(saved)

    async def drop_ephemeral(self, run_ids: Sequence[str]) -> None:
        """Delete what goes with the session of these runs."""
        for saved in [s for s in self._saved.values() if s.ephemeral and s.run_id in run_ids]:
            await self.delete(saved)

    async def sweep(self) -> None:
        """Delete what has expired."""
        now = time.time()
        for saved in [s for s in self._saved.values() if s.expires_at is not None and s.expires_at <= now]:
            await self.delete(saved)

    def _take_in(self, saved: Saved) -> None:
        self._saved.pop(saved.path, None)  # the newest is last
        self._saved[saved.path] = saved
        reference = AdapterRef(saved.path, 1, saved.digest, saved.folder)
        self._adapters.add_checkpoint([saved.path], reference, tenant=saved.tenant)

    async def _drop(self, saved: Saved) -> None:
        await self._adapters.drop_checkpoint([saved.path])
        task = asyncio.create_task(self._remove_files(saved))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _remove_files(self, saved: Saved) -> None:
        await self._generator.unused(saved.folder)
        await asyncio.to_thread(shutil.rmtree, saved.folder, True)


def check_ttl(ttl: int | None) -> int | None:
    """Seconds until a save goes, None for never; InvalidRequest."""
    if ttl is not None and not LEAST_TTL <= ttl <= MOST_TTL:
        raise InvalidRequest(
            f"ttl_seconds must be from {LEAST_TTL} to {MOST_TTL}, not {ttl}.", param="ttl_seconds"
        )
    return ttl


def newest(saved: Sequence[Saved], kind: str) -> Saved | None:
    """The newest of a kind, of those given newest first."""
    return next((one for one in saved if one.kind == kind), None)


def _path(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"
