"""A safetensors file written and hashed in one pass, from where the arrays lie and without holding Python's
lock, so that a thread that writes hardly keeps others from running. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

PASS = 4 << 20  # bytes written and hashed at a time
_DTYPES = {"float32": "F32", "uint8": "U8"}


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> str:
    """Write arrays (float32 or uint8) to a file, synced to disk; returns its sha256 (hex). One that isn't
    contiguous is copied for itself."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    # The wider type first, so that every tensor is aligned to its own items.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        array = tensors[name]
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in names)):
            for start in range(0, len(part), PASS):
                _write(file.fileno(), part[start : start + PASS])
                digest.update(part[start : start + PASS])
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _write(descriptor: int, part: bytes | memoryview) -> None:
    while len(part):
        part = part[os.write(descriptor, part) :]
