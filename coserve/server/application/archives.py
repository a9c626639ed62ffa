"""PEFT directories as archives: a tar going out, a tar or zip of plain files coming in."""

from __future__ import annotations

import gzip
import hashlib
import io
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
_MAX_MEMBERS = 1000
_MAX_TAR_HEADER = 8 * 2**10  # bytes of a long name or of a file's extra attributes
_PLAIN_ZIP = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others expand without a bound


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
    """Write the adapter files of a tar, tar.gz or zip into `target`, a fresh directory.

    Only plain files count, at the top or in one folder; anything that could leave the folder (links,
    absolute names, "..") refuses the archive. What it expands to is bounded while it is read, whatever it
    says of itself. Raises InvalidRequest, or PayloadTooLarge over `limit` bytes.
    """
    target.mkdir(parents=True)
    found: dict[str, PurePosixPath] = {}
    left = limit
    try:
        for count, (name, stream) in enumerate(_members(archive, limit)):
            path = PurePosixPath(name)
            if count >= _MAX_MEMBERS:
                raise _bad(f"it has over {_MAX_MEMBERS} members")
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise _bad(f"the name {name[:100]!r} leaves the archive")
            if path.name not in _WANTED:
                continue
            if len(path.parts) > 2 or path.name in found:
                raise _bad(f"{path.name} must be there once, at the top or in one folder")
            found[path.name] = path
            with (target / path.name).open("xb") as out:
                left -= _copy(stream, out, left)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise _bad(f"it can't be read ({type(error).__name__})") from None
    for name in _WANTED:
        if name not in found:
            raise _bad(f"{name} is missing (pickle files are never loaded)")


def _bad(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The archive is refused: {reason}.", param="file", code="invalid_archive")


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge("The archive's files are over the upload limit.", param="file")


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> int:
    copied = 0
    while chunk := source.read(_CHUNK):
        copied += len(chunk)
        if copied > limit:
            raise _too_large()
        target.write(chunk)
    return copied


def _members(archive: Path, limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    with io.FileIO(archive) as file:
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"PK":
            yield from _zip_members(_SmallReads(file))
        elif magic[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as expanded:
                yield from _tar_members(_Bounded(expanded, limit))
        else:
            yield from _tar_members(_Bounded(file, limit))


class _Bounded(io.RawIOBase):
    """What an archive expands to, up to `limit` bytes and the headers of as many members as it may have."""

    def __init__(self, source: IO[bytes] | io.RawIOBase, limit: int) -> None:
        self._source = source
        self._left = limit + _MAX_MEMBERS * (_MAX_TAR_HEADER + 4 * _BLOCK)

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(_CHUNK if size < 0 else min(size, _CHUNK)) or b""
        self._left -= len(chunk)
        if self._left < 0:
            raise _too_large()
        return chunk


class _SmallReads(io.BufferedReader):
    """A file that gives no more than a chunk at once: a zip's directory is read in one piece, and its size is
    what the archive says."""

    def read(self, size: int | None = -1) -> bytes:
        chunk = super().read(_CHUNK + 1 if size is None or size < 0 else min(size, _CHUNK + 1))
        if len(chunk) > _CHUNK:
            raise zipfile.BadZipFile
        return chunk


class _PlainTarInfo(tarfile.TarInfo):
    """Members as tarfile reads them, but headers that it would read into memory whatever their size."""

    _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) + (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._LONG and self.size > _MAX_TAR_HEADER:
            raise tarfile.ReadError
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError
        found: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return found


def _tar_members(file: _Bounded) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_PlainTarInfo) as tar:  # type: ignore[call-overload]
        for member in tar:
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise _bad(f"{member.name[:100]!r} is not a plain file")
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream


def _zip_members(file: _SmallReads) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(file) as bundle:
        for info in bundle.infolist():
            if info.is_dir():
                continue
            kind = (info.external_attr >> 16) & 0o170000
            if kind not in (0, 0o100000):
                raise _bad(f"{info.filename[:100]!r} is not a plain file")
            if info.compress_type not in _PLAIN_ZIP:
                raise _bad(f"{info.filename[:100]!r} is packed in another way than deflate")
            with bundle.open(info) as stream:
                yield info.filename, stream
