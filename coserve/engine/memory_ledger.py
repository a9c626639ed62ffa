"""Whose memory is whose: the engine's process, down to the last byte.

    sum(owners) = held by the process now (resident) + promised to the pool but never touched (untouched)

Everything that has a size of its own is counted by it. What is left when the engine starts, the interpreter
and its libraries, is "runtime", with the files' pages that are mapped later; what comes on top, tensors that
live inside a step and freed memory that the allocator keeps for the next one, is "workspace". On a GPU all of
it is the device memory that torch holds.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from coserve.engine.engine import Engine

CHUNK_PAGES = 4096  # looked at in one call of the system


class HeldMemory(NamedTuple):
    """Bytes: `resident` in RAM, `files` of them pages of mapped files, `untouched` pages of the pool that
    nobody has written yet."""

    resident: int
    files: int
    untouched: int


class MemoryLedger:
    """The ledger of one engine, made when nothing has run yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pages = TouchedPages(engine.kv.arena)
        held = self.held()
        self._runtime = held.resident + held.untouched - sum(self._counted().values()) - held.files

    def owners(self, held: HeldMemory) -> dict[str, int]:
        """Bytes by owner. "kv" is what requests and the prefix cache have of the pool, "activations" what
        training has of it, "free" the rest, touched or not."""
        owners = self._counted()
        rest = max(0, held.resident + held.untouched - sum(owners.values()))
        owners["runtime"] = min(rest, max(0, self._runtime + held.files))
        owners["workspace"] += rest - owners["runtime"]
        return owners

    def held(self) -> HeldMemory:
        """What the process has now."""
        arena, blocks, slab = self._engine.kv.arena, self._engine.blocks, self._engine.kv.slab_bytes
        if arena.is_cuda:
            return HeldMemory(torch.cuda.memory_reserved(arena.device), 0, 0)
        resident, files = resident_bytes()
        if not resident:
            return HeldMemory(0, 0, 0)
        below, above = blocks.never_owned
        touched = self._pages.touched((0, below * slab), (above * slab, arena.nbytes))
        return HeldMemory(resident, files, max(0, arena.nbytes - touched))

    def _counted(self) -> dict[str, int]:
        engine = self._engine
        blocks, slab = engine.blocks, engine.kv.slab_bytes
        # On a CPU rows that nobody has are no memory, and the host's copies of adapters are the same memory.
        on_gpu = engine.kv.arena.is_cuda
        rows = engine.pool.nbytes if on_gpu else engine.pool.bytes_of(engine.slots.rows_in_use)
        return {
            "weights": engine.decoder.nbytes,
            "kv": (blocks.num_kv_blocks + blocks.num_idle) * slab,
            "activations": blocks.num_extent_slabs * slab,
            "adapters": rows + (0 if on_gpu else engine.adapters.host_bytes),
            "optimizer": engine.jobs.optimizer_bytes,
            "workspace": engine.jobs.workspace_bytes,
            "free": (blocks.num_free - blocks.num_idle) * slab,
        }


class TouchedPages:
    """Which pages of an allocation on the CPU were touched. A touched page stays, so a chunk that was full
    once isn't looked at again."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._begin = memory.data_ptr() // self._page * self._page
        self._pages = -(-(memory.data_ptr() + memory.nbytes - self._begin) // self._page)
        self._counts: dict[int, int] = {}  # touched pages by chunk
        self._mincore = getattr(ctypes.CDLL(None), "mincore", None)

    def touched(self, *ranges: tuple[int, int]) -> int:
        """Bytes in touched pages of the chunks that bytes [start, end) of the ranges lie in."""
        chunk = CHUNK_PAGES * self._page
        numbers = {n for start, end in ranges for n in range(start // chunk, -(-end // chunk))}
        return sum(map(self._look, numbers)) * self._page

    def _look(self, chunk: int) -> int:
        first = chunk * CHUNK_PAGES
        count = min(CHUNK_PAGES, self._pages - first)
        if self._mincore is None or self._counts.get(chunk) == count:
            return count
        found = (ctypes.c_ubyte * count)()
        address, length = self._begin + first * self._page, count * self._page
        failed = self._mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), found)
        self._counts[chunk] = count if failed else bytes(found).count(1)
        return self._counts[chunk]


def resident_bytes(pid: int | None = None) -> tuple[int, int]:
    """Memory of a process, this one unless named, that is in RAM, and how much of it is pages of files; zeros
    where the system has no /proc."""
    statm = Path(f"/proc/{pid or 'self'}/statm")
    if not statm.exists():
        return 0, 0
    _, resident, files, *_ = map(int, statm.read_text().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, files * page
