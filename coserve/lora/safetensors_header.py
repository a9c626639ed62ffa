"""The header of a safetensors file, checked before any tensor is touched.

The file is 8 bytes of header length (little endian), the header as JSON (name -> dtype, shape, byte range),
and the tensors' bytes, which the ranges must cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 8
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class BadSafetensors(Exception):
    """The file is not a whole safetensors file; the message is the reason."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's dtype ("F32", "BF16", ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor. Raises BadSafetensors, OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise BadSafetensors("it is cut short or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise BadSafetensors("its header is not JSON") from error
    if not isinstance(header, dict):
        raise BadSafetensors("its header is not a JSON object")
    entries: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int]] = []
    for name, value in header.items():
        if name != "__metadata__":
            entries[name], span = _entry(name, value)
            ranges.append(span)
    end = 0
    for begin, stop in sorted(ranges):
        if begin != end:
            raise BadSafetensors("its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        raise BadSafetensors("its length does not match its header; the file is cut short or damaged")
    return entries


def _entry(name: str, value: object) -> tuple[TensorEntry, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]  # type: ignore[index]
        sizes, item = tuple(shape), _ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError) as error:
        raise BadSafetensors(f"its entry for {name[:200]!r} is malformed") from error
    # Before anything is multiplied: numbers of a header may have thousands of digits.
    if len(sizes) > _MAX_DIMENSIONS or not all(_is_size(number) for number in (begin, end, *sizes)):
        raise BadSafetensors(f"its entry for {name[:200]!r} is malformed")
    if end - begin != math.prod(sizes) * item:
        raise BadSafetensors(f"the byte range of {name[:200]!r} does not match its shape")
    return TensorEntry(dtype, sizes), (begin, end)


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**62
