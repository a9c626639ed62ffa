"""The state directory: its layout, its lock, and durable files in it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from coserve.errors import ConfigError

logger = logging.getLogger(__name__)


class StateDir:
    """Folders of one server's state; held by a lock for as long as the object is open.

    Raises ConfigError when another server holds the directory, or it can't be written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.files = self.root / "files"
        self.uploads = self.root / "uploads"
        self.jobs = self.root / "jobs"
        self.adapters = self.root / "adapters"
        self.tinker = self.root / "tinker"
        self.database = self.root / "coserve.sqlite"
        self.engine_log = self.root / "engine.log"
        self.latency_model = self.root / "latency_model.json"
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds training data
            for folder in (self.files, self.uploads, self.jobs, self.adapters, self.tinker):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.root / "lock")
        except OSError as error:
            raise ConfigError(
                f"--state-dir {self.root}: {error.strerror or error}; choose another directory.",
                param="state_dir",
            ) from None
        remove_temporary(self.root)

    def adapter(self, name: str, version: int) -> Path:
        """Where a version's PEFT directory lies; the name is quoted so that it is one folder."""
        return self.adapters / quote(name, safe="-._~") / str(version)

    def keep_adapters(self, kept: set[str]) -> None:
        """Remove the version folders that aren't `kept`."""
        with os.scandir(self.adapters) as names:
            for name in names:
                with os.scandir(name.path) as versions:
                    for folder in [version.path for version in versions if version.path not in kept]:
                        shutil.rmtree(folder, ignore_errors=True)

    def job(self, job_id: str) -> Path:
        """The folder of a job."""
        return self.jobs / job_id

    def save_latency_model(self, text: str) -> None:
        """Replace the latency model's file. It can be learnt again, so it isn't synced, and a disk that
        refuses it stops nothing."""
        temporary = self.latency_model.with_suffix(".tmp")
        try:
            temporary.write_text(text, encoding="ascii")
            temporary.replace(self.latency_model)
        except OSError as error:
            logger.warning("the latency model can't be saved: %s", error)

    def close(self) -> None:
        """Give the directory free for another server."""
        self._lock.close()


def _lock(path: Path) -> TextIO:
    handle = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read(20).strip()
        handle.close()
        raise ConfigError(
            f"--state-dir {path.parent} is in use by another server (process {holder or 'unknown'}).",
            param="state_dir",
        ) from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def remove_temporary(root: Path) -> None:
    """Delete everything whose name ends in .tmp: what a killed server left half written."""
    for folder, folders, files in os.walk(root):
        for name in [name for name in folders if name.endswith(".tmp")]:
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
            folders.remove(name)
        for name in files:
            if name.endswith(".tmp"):
                (Path(folder) / name).unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_directory(
    source: Path, target: Path, names: tuple[str, ...] | None = None, *, link: bool = False
) -> None:
    """Copy plain files of `source` to `target`, which appears whole or not at all.

    An existing `target` is replaced: only call this for a place that no row points to. With `link` the files
    are shared where the file system can: for synced ones that nobody writes to any more.
    """
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and (names is None or path.name in names):
            _bring(path, temporary / path.name, link)
    sync_directory(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    sync_directory(target.parent)


def _bring(source: Path, target: Path, link: bool) -> None:
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    with target.open("rb") as handle:
        os.fsync(handle.fileno())
