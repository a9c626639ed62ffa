"""The AMX level of the base products, on tile instructions in software (no AMX machine is needed)."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coserve.kernels.linear import PANEL, _pack_elements
from tests.kernels.oracle import error

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
# Edges of panels (16), of tiles (32 rows, 32 columns, 32 of k), of blocks of depth (512 and 1024).
SHAPES = [(1, 1), (16, 32), (32, 31), (33, 33), (47, 64), (48, 100), (100, 257), (40, 1040), (1044, 24)]


class Emulated:
    """The compiled library, called with tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.tiles_are_released.restype = ctypes.c_bool

    def pack(self, weight_NK: torch.Tensor) -> torch.Tensor:
        N, K = weight_NK.shape
        pack = torch.zeros(_pack_elements(N, K, torch.bfloat16), dtype=torch.bfloat16)
        self._call("pack_weight", weight_NK.data_ptr(), weight_NK.stride(0), N, K, pack.data_ptr())
        return pack

    def multiply(
        self,
        transposed: bool,
        a: torch.Tensor,
        pack: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty(len(a), shape[1] if transposed else shape[0], dtype=torch.bfloat16)
        bias_pointer = 0 if bias is None else bias.data_ptr()
        words = (int(transposed), a.data_ptr(), a.stride(0), len(a), pack.data_ptr(), *shape, bias_pointer)
        self._call("linear", *words, out.data_ptr(), out.stride(0))
        assert self._library.tiles_are_released()
        return out

    def _call(self, name: str, *words: int) -> None:
        getattr(self._library, name)(*(ctypes.c_int64(word) for word in words))


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    assert COMPILER is not None
    target = tmp_path_factory.mktemp("amx") / "amx.so"
    flags = ["-std=gnu++17", "-O2", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"]
    sources = ["-I", str(HERE), "-I", str(HERE.parents[1] / "csrc"), str(HERE / "amx_emulated.cpp")]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(target)], check=True)
    return Emulated(ctypes.CDLL(str(target)))


@pytest.mark.parametrize("shape", SHAPES)
def test_both_products_are_as_good_as_torch(amx: Emulated, shape: tuple[int, int]) -> None:
    N, K = shape
    weight, bias = torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    pack = amx.pack(weight)
    for M in (0, 1, 15, 17, 33, 64):
        x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
        want = F.linear(x.double(), weight.double(), bias.double())
        limit = 1.5 * error(F.linear(x, weight, bias), want) + 1e-6
        assert error(amx.multiply(False, x, pack, shape, bias), want) <= limit
        want = dy.double() @ weight.double()
        assert error(amx.multiply(True, dy, pack, shape), want) <= 1.5 * error(dy @ weight, want) + 1e-6


@pytest.mark.parametrize("shape", [(49, 33), (100, 600), (1044, 40), (36, 1060)])
def test_a_row_does_not_depend_on_its_batch(amx: Emulated, shape: tuple[int, int]) -> None:
    N, K = shape
    pack = amx.pack(torch.randn(N, K).bfloat16())
    for transposed, width in ((False, K), (True, N)):
        a = torch.randn(80, width).bfloat16()
        alone = torch.cat([amx.multiply(transposed, row, pack, shape) for row in a.split(1)])
        for first, M in ((0, 80), (3, 2), (5, 16), (7, 17), (20, 32), (9, 33), (31, 47)):
            got = amx.multiply(transposed, a[first : first + M], pack, shape)
            assert torch.equal(got, alone[first : first + M])


def test_what_lies_beside_the_rows_is_not_read(amx: Emulated) -> None:
    shape = (21, 45)
    pack, wide = amx.pack(torch.randn(shape).bfloat16()), torch.full((40, 100), torch.nan).bfloat16()
    wide[:, 10:55] = torch.randn(40, 45)
    for transposed, end in ((False, 55), (True, 31)):
        a = wide[:, 10:end]
        want = amx.multiply(transposed, a.contiguous(), pack, shape)
        assert torch.equal(amx.multiply(transposed, a, pack, shape), want) and not want.isnan().any()


def test_panels_are_filled_up_to_whole_tiles() -> None:
    assert _pack_elements(17, 33, torch.bfloat16) == 2 * PANEL * 64
