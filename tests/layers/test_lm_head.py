"""The head's adapters by runs of rows, and what its forward asks of a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coserve.kernels import dispatch
from coserve.kernels.dropout import Dropout, row_keys
from coserve.layers.batch import HeadAdapter
from coserve.layers.lm_head import HeadRun, LMHead

V, H = 50, 24
FROM_THE_HOST = {"aten::lift_fresh", "aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}


class Watched(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def adapter(rank: int, device: str = "cpu") -> HeadAdapter:
    return HeadAdapter(torch.randn(rank, H, device=device), torch.randn(rank, V, device=device))


def test_rows_get_what_their_run_adds() -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(V, H), torch.randn(9, H)
    runs = [HeadRun(1, 3, adapter(3)), HeadRun(5, 9, adapter(1))]
    want = h.double() @ weight.double().t()
    for start, end, (a, b), _ in runs:
        want[start:end] += h[start:end].double() @ a.double().t() @ b.double()
    torch.testing.assert_close(LMHead(weight).forward(h, runs).double(), want, rtol=0, atol=1e-4)


def test_tables_of_runs_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host would hold up the launches behind it and could not be held by a graph."""
    triton = pytest.importorskip("triton")
    launched = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda self, *_, **__: launched.append(self))
    monkeypatch.setattr(dispatch, "_backend", "triton")
    head, h = LMHead(torch.zeros(V, H, device="meta")), torch.zeros(6, H, device="meta")
    keys = torch.from_numpy(row_keys(1, 2, 3, np.arange(4))).to("meta")
    drops = Dropout(keys, torch.zeros(1, dtype=torch.float64, device="meta"))
    runs = [HeadRun(0, 2, adapter(3, "meta")), HeadRun(2, 6, adapter(8, "meta"), drops)]
    with torch.inference_mode(), Watched() as watched:
        assert head.forward(h, runs).shape == (6, V)
    assert len(launched) == 4 and not watched.names & FROM_THE_HOST
