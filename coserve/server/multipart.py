"""multipart/form-data straight to disk: a body of any size passes through a few chunks of memory."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from coserve.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

_MAX_FIELD_BYTES = 1 << 20
_MAX_PARTS = 32
_MAX_PART_HEADERS = 8 << 10  # bytes of one part's names and values
_MAX_BOUNDARY = 70  # RFC 2046


@dataclass
class Form:
    """The fields of a form and its one file: `filename` as the client gave it, `path` a temporary file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    path: Path | None = None
    size: int = 0

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Receiver:
    """Callbacks of the parser: collects fields, writes the part `file_name` to disk."""

    def __init__(self, folder: Path, limit: int, file_name: str) -> None:
        self.form = Form()
        self._file_name = file_name
        self._folder = folder
        self._limit = limit
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._header_bytes = 0
        self._parts = 0
        self._name = ""
        self._value = bytearray()
        self._file: IO[bytes] | None = None

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_text,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers, self._value = {}, bytearray()
        self._header_bytes = 0
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequest(f"The form has over {_MAX_PARTS} parts.")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += self._counted(data[start:end])

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._header_value += self._counted(data[start:end])

    def _counted(self, data: bytes) -> bytes:
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_PART_HEADERS:
            raise InvalidRequest("A part of the form has too long headers.")
        return data

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if self._name != self._file_name:
            return
        if self.form.path is not None:
            raise InvalidRequest("The form has more than one file.", param=self._file_name)
        self.form.filename = (filename or b"upload").decode("utf-8", "replace")
        self.form.path = self._folder / f"{uuid.uuid4().hex}.tmp"
        self._file = self.form.path.open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self.form.size += end - start
            if self.form.size > self._limit:
                raise PayloadTooLarge(
                    f"The file is over the limit of {self._limit} bytes.", param=self._file_name
                )
            self._file.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise PayloadTooLarge("A field of the form is too long.", param=self._name)

    def _end(self) -> None:
        if self._file is not None:
            self.close()
        else:
            self.form.fields[self._name] = self._value.decode("utf-8", "replace")


async def receive_form(request: Request, folder: Path, limit: int, file_name: str = "file") -> Form:
    """Read a form whose part `file_name` may have `limit` bytes; the caller moves or discards the file.

    Raises UnsupportedMediaType, PayloadTooLarge, InvalidRequest; nothing is left behind then.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("The body must be multipart/form-data.")
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > _MAX_BOUNDARY:
        raise InvalidRequest(f"The multipart body needs a boundary of 1 to {_MAX_BOUNDARY} characters.")
    most = limit + _MAX_PARTS * (_MAX_FIELD_BYTES + _MAX_PART_HEADERS)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise PayloadTooLarge(f"The file is over the limit of {limit} bytes.", param=file_name)
    receiver = _Receiver(folder, limit, file_name)
    try:
        parser = MultipartParser(boundary, receiver.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            most -= len(chunk)
            if most < 0:
                raise PayloadTooLarge(f"The file is over the limit of {limit} bytes.", param=file_name)
            if chunk:
                parser.write(chunk)
        parser.finalize()
        if receiver._file is not None:
            raise InvalidRequest("The multipart body ends in the middle of the file.", param=file_name)
    except BaseException as error:
        receiver.close()
        receiver.form.discard()
        if isinstance(error, FormParserError):
            raise InvalidRequest("The body is not valid multipart/form-data.") from None
        raise
    return receiver.form
