"""A short word for which base weights are served, the same wherever the same files are. Free of torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64  # of each file, spread evenly: a checkpoint of 16 GB takes milliseconds
_SAMPLE_BYTES = 4096


def model_fingerprint(directory: str | Path) -> str:
    """ "fp_" and ten hex digits over a model directory's config.json and its safetensors files: their names,
    lengths, and samples of their bytes. OSError when they can't be read."""
    folder = Path(directory)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return "fp_" + digest.hexdigest()[:10]
