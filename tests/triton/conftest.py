"""Triton's kernels in its interpreter, on CPU tensors.

The interpreter is chosen by TRITON_INTERPRET=1 before triton is imported, for a whole process. So the run of
all tests skips this folder, and tests/kernels/test_triton.py starts a process of its own for it. By hand:

    TRITON_INTERPRET=1 pytest tests/triton
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from coserve.kernels.dispatch import use_backend

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    """The public functions run their Triton kernels; a fixed seed, one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad(), use_backend("triton"):
        yield
