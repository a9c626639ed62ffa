from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from coserve.kernels import dispatch


def test_one_openmp_runtime_is_loaded() -> None:
    code = (
        "import torch\n"
        "from coserve.kernels.linear import PackedLinear\n"
        "PackedLinear(torch.randn(512, 512)).forward(torch.randn(64, 512))\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in maps if 'libgomp' in line or 'libiomp' in line}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_backend_is_chosen_and_restored() -> None:
    x = torch.zeros(1)
    before = dispatch.native_for(x)
    with dispatch.use_backend("reference"):
        assert dispatch.native_for(x) is None
    assert dispatch.native_for(x) is before
    with pytest.raises(ValueError, match="unknown backend"), dispatch.use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_float64_runs_on_the_reference() -> None:
    assert dispatch.native_for(torch.zeros(1, dtype=torch.float64)) is None


def test_isa_is_chosen_and_restored(isa: str) -> None:
    assert dispatch.isa() == isa
    with pytest.raises(ValueError, match="unknown"), dispatch.use_isa("mmx"):
        pass
    assert dispatch.isa() == isa
