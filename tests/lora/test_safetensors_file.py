"""Files as safetensors reads them, with the sum of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from coserve.lora import safetensors_file
from coserve.lora.safetensors_file import write_tensors
from coserve.lora.safetensors_header import read_header


def test_what_is_written_is_read_by_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PASS", 100)
    numbers = np.random.default_rng(1)
    tensors = {
        "codes": numbers.integers(0, 256, (3, 7), dtype=np.uint8),
        "b.transposed": numbers.random((5, 30), dtype=np.float32).T,
        "a": numbers.random(41, dtype=np.float32),
        "nothing": np.zeros((0, 4), dtype=np.float32),
    }
    path = tmp_path / "file.safetensors"
    digest = write_tensors(path, tensors, {"format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_header(path).keys() == tensors.keys()
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in tensors.items():
            assert np.array_equal(file.get_tensor(name), array)
    with pytest.raises(KeyError, match="float64"):
        write_tensors(path, {"wide": np.zeros(3)})
