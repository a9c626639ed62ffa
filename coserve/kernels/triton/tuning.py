"""Block sizes, warps and stages of every kernel: a committed table, looked up and never measured at run time.

A kernel file declares one `Tuned` for each kernel with a setting that works everywhere. `tables.json` may
hold a better one for a compute capability, as bench/tune.py writes it on a device:
{"sm_90": {"rms_norm": {"TILE": 2048, "num_warps": 8, "num_stages": 2}}}.
A setting never depends on the batch, so results don't either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent / "tables.json"


@dataclass(frozen=True)
class Tuned:
    """One kernel's settings by name, `num_warps` and `num_stages` among them.

    `candidates` are what the bench tries beside `default`; all must give the same bits or say in the kernel
    file why they don't. `example(device)` makes a call of representative size for the bench.
    """

    name: str
    default: Mapping[str, int]
    candidates: tuple[Mapping[str, int], ...] = ()
    example: Callable[[torch.device], Callable[[], Any]] | None = field(default=None, compare=False)

    def on(self, device: torch.device) -> Mapping[str, int]:
        """The settings for a device, to be passed to a launch by **; the default off CUDA."""
        return self.for_architecture(architecture(device))

    def for_architecture(self, name: str) -> Mapping[str, int]:
        """The settings for "sm_90" and the like."""
        return _overrides.get(self.name) or tables().get(name, {}).get(self.name, self.default)


_overrides: dict[str, Mapping[str, int]] = {}


@contextmanager
def override(tuned: Tuned, settings: Mapping[str, int]) -> Iterator[None]:
    """Launch a kernel with these settings inside the block."""
    _overrides[tuned.name] = settings
    try:
        yield
    finally:
        del _overrides[tuned.name]


@cache
def tables() -> dict[str, dict[str, dict[str, int]]]:
    """The committed table: settings by architecture and kernel."""
    return json.loads(TABLES.read_text(encoding="utf-8"))


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; "cpu" in the interpreter."""
    if device.type != "cuda":
        return "cpu"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
