"""Triton's kernels against float64, in a process of their own: its interpreter is chosen at its import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coserve.errors import ConfigError
from coserve.kernels import dispatch
from coserve.kernels.rms_norm import _rms_norm_reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
def test_the_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton"]
    chosen = request.config.getoption("markexpr")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "-m", chosen], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_cuda_without_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA tensor no reference is run in Triton's place."""

    class CudaTensor:
        is_cuda, dtype = True, torch.float32

    dispatch._triton_kernel.cache_clear()
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton"):
        dispatch.triton_or_reference(CudaTensor(), _rms_norm_reference)
    with dispatch.use_backend("reference"):
        assert dispatch.triton_or_reference(CudaTensor(), _rms_norm_reference) is _rms_norm_reference


def test_the_triton_backend_asks_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"), dispatch.use_backend("triton"):
        pass
