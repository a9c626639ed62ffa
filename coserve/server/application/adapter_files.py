"""Adapter files out of the folders that operators opened, and out of nowhere else.

A path is judged by what was opened, not by what it was a moment ago: whoever can write to such a folder could
put a link in its place in between.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from coserve.errors import InvalidRequest, NotFound, PayloadTooLarge
from coserve.lora.peft_files import TENSOR_FILE, no_tensors

_PARAM = "lora_path"
_CHUNK = 1 << 20


def allowed_directory(path: str, roots: Sequence[Path]) -> Path:
    """Where the directory `path` really is. Raises InvalidRequest unless that is under one of `roots`, which
    are resolved themselves, and NotFound when it isn't there."""
    try:
        resolved = Path(path).resolve()
        is_dir = resolved.is_dir()
    except (OSError, ValueError, RuntimeError):  # no path at all, too long, or links that go round
        raise _outside() from None
    if not _is_under(resolved, roots):
        raise _outside()
    if not is_dir:
        raise NotFound("There is no adapter directory at this path.", param=_PARAM)
    return resolved


def fetch(source: Path, target: Path, names: Sequence[str], roots: Sequence[Path], limit: int) -> None:
    """Copy the plain files `names` of `source`, those that are there, into `target`, a fresh directory.

    They are synced. A file that lies outside of `roots`, by a link in it or on the way to it, is refused as
    the path would be. Raises InvalidRequest, and PayloadTooLarge over `limit` bytes of a file.
    """
    target.mkdir(parents=True)
    for name in names:
        try:
            # Not blocking: a pipe of that name would wait for a writer.
            handle = os.open(source / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidRequest(f"{name} can't be read ({error.strerror}).", param=_PARAM) from None
        try:
            _check(handle, name, roots, limit)
            with os.fdopen(handle, "rb", closefd=False) as file, (target / name).open("xb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK)
                copy.flush()
                os.fsync(copy.fileno())
        finally:
            os.close(handle)
    if not (target / TENSOR_FILE).exists():
        raise InvalidRequest(f"cannot load the adapter: {no_tensors(source)}", param=_PARAM)


def _check(handle: int, name: str, roots: Sequence[Path], limit: int) -> None:
    """That an opened file is a plain one of a fit size under `roots`, asked of the system by its handle."""
    found = os.fstat(handle)
    if not _is_under(Path(os.readlink(f"/proc/self/fd/{handle}")), roots):
        raise _outside()
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequest(f"{name} is not a plain file.", param=_PARAM)
    if found.st_size > limit:
        raise PayloadTooLarge(f"{name} is over the limit of {limit} bytes.", param=_PARAM)


def _is_under(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _outside() -> InvalidRequest:
    return InvalidRequest(
        "This path is not under an --adapter-root of the server.", param=_PARAM, code="path_not_allowed"
    )
