"""PEFT directories as archives: a tar going out, a tar or zip of plain files coming in."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from coserve.errors import InvalidRequest, PayloadTooLarge
from coserve.lora.peft_files import CONFIG_FILE, TENSOR_FILE

_CHUNK = 1 << 20
_BLOCK = 512
_WANTED = (CONFIG_FILE, TENSOR_FILE)


def tar_chunks(directory: Path) -> Iterator[bytes]:
    """A tar of the directory's plain files, chunk by chunk; the same bytes every time."""
    for path in sorted(directory.iterdir()):
        if not path.is_file():
            continue
        info = tarfile.TarInfo(path.name)
        info.size = path.stat().st_size
        info.mode = 0o644
        yield info.tobuf(tarfile.PAX_FORMAT)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
        yield bytes(-info.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def tar_size(directory: Path) -> int:
    """Bytes of what `tar_chunks` gives."""
    sizes = [path.stat().st_size for path in directory.iterdir() if path.is_file()]
    return sum(_BLOCK + size + -size % _BLOCK for size in sizes) + 2 * _BLOCK


def check_digest(archive: Path, sha256: str) -> None:
    """Raise InvalidRequest unless that is the file's sha256 (hex)."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise InvalidRequest(
            f"The archive's sha256 is {found}, not {sha256[:64]!r}: send it again.", param="sha256"
        )


def extract(archive: Path, target: Path, limit: int) -> None:
    """Write the adapter files of a tar or zip into `target`, a fresh directory.

    Only plain files count, at the top or in one folder; anything that could leave the folder (links,
    absolute names, "..") refuses the archive. Raises InvalidRequest, or PayloadTooLarge over `limit` bytes.
    """
    target.mkdir(parents=True)
    found: dict[str, PurePosixPath] = {}
    left = limit
    try:
        for name, stream in _members(archive):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise _bad(f"the name {name[:100]!r} leaves the archive")
            if path.name not in _WANTED:
                continue
            if len(path.parts) > 2 or path.name in found:
                raise _bad(f"{path.name} must be there once, at the top or in one folder")
            found[path.name] = path
            with (target / path.name).open("wb") as out:
                left -= _copy(stream, out, left)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise _bad(f"it can't be read ({type(error).__name__})") from None
    for name in _WANTED:
        if name not in found:
            raise _bad(f"{name} is missing (pickle files are never loaded)")


def _bad(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The archive is refused: {reason}.", param="file", code="invalid_archive")


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> int:
    copied = 0
    while chunk := source.read(_CHUNK):
        copied += len(chunk)
        if copied > limit:
            raise PayloadTooLarge("The archive's files are over the upload limit.", param="file")
        target.write(chunk)
    return copied


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
        return
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if member.isdir():
                continue
            if not member.isreg():
                raise _bad(f"{member.name[:100]!r} is not a plain file")
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as bundle:
        for info in bundle.infolist():
            if info.is_dir():
                continue
            kind = (info.external_attr >> 16) & 0o170000
            if kind not in (0, 0o100000):
                raise _bad(f"{info.filename[:100]!r} is not a plain file")
            with bundle.open(info) as stream:
                yield info.filename, stream
