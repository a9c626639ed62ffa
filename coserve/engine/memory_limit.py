"""How much memory there is: for this process by its cgroup and the machine, for adapters and jobs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from coserve.engine.memory_ledger import resident_bytes

CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # a limit of cgroup v1 that is none


def memory_limit(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process's memory may reach: the machine's, or the least limit of its cgroups."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits(cgroups, own)])


def memory_limit_of(device: torch.device) -> int:
    """Bytes that there are for the engine: the device's, or what this process may use of the machine's."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit()


def _limits(cgroups: Path, own: Path) -> list[int]:
    """Those of the process's cgroup and of all above it, in v2 and v1; where a container shows only its own,
    that is at the root."""
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, name = cgroups, "memory.max"
        if controllers:
            root, name = cgroups / "memory", "memory.limit_in_bytes"
            if "memory" not in controllers.split(","):
                continue
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            file = root / folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text.isdecimal() and int(text) < NO_LIMIT:
                found.append(int(text))
    return found


def memory_for_adapters() -> int:
    """Bytes that adapters may take in host memory where nobody says: an eighth of all."""
    return memory_limit() // 8


def memory_for_jobs(device: torch.device, promised: int) -> int:
    """Bytes that jobs may hold outside the pool, asked once everything else has its place. `promised` bytes
    are still untouched on a CPU: the pool's and the adapter rows'. Never less than 0.

    The server's process counts too: it lies in the same cgroup.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    server, _ = resident_bytes(os.getppid())
    return max(0, memory_limit() - resident_bytes()[0] - promised - server)
