"""A word for which base weights are served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coserve.models.fingerprint import model_fingerprint


def make(folder: Path, seed: int = 0, config: str = "{}", size: int = 500_000) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    save_file({"w": values}, folder / "model.safetensors")
    return folder


def test_equal_files_have_equal_fingerprints(tmp_path: Path) -> None:
    first = model_fingerprint(make(tmp_path / "a"))
    assert first == model_fingerprint(make(tmp_path / "b"))
    assert first.startswith("fp_") and len(first) == 13


@pytest.mark.parametrize("change", [{"seed": 1}, {"config": '{"a": 1}'}, {"size": 500_001}])
def test_other_files_have_others(tmp_path: Path, change: dict) -> None:
    assert model_fingerprint(make(tmp_path / "a")) != model_fingerprint(make(tmp_path / "b", **change))


def test_a_file_shorter_than_a_sample(tmp_path: Path) -> None:
    assert model_fingerprint(make(tmp_path / "a", size=3)) != model_fingerprint(
        make(tmp_path / "b", 1, size=3)
    )
