"""Reads adapters' files in threads of their own, several at a time as far as their bytes allow, in the order
of the requests that wait for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from coserve.lora.packed_adapter import PackedAdapter
from coserve.lora.peft_files import TENSOR_FILE

THREADS = max(1, min(4, os.cpu_count() or 1))
MOST_BYTES = 256 << 20  # of the files that are read at the same time; a larger one is read alone

Order = tuple[int, float, str]  # priority, time, id: as requests have it
Read = Callable[[str, str], PackedAdapter]


class AdapterLoader:
    """`read(path, digest)` gives an adapter or raises."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._wanted: dict[str, Order] = {}
        self._reading: dict[str, tuple[Future[PackedAdapter], int]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="adapter-load")

    def __contains__(self, digest: object) -> bool:
        return digest in self._wanted or digest in self._reading

    @property
    def is_busy(self) -> bool:
        """Something is read, or will be."""
        return bool(self._wanted or self._reading)

    @property
    def has_wishes(self) -> bool:
        """Something isn't read yet."""
        return bool(self._wanted)

    @property
    def reading(self) -> tuple[int, int]:
        """How many are read now, and the bytes of their files."""
        return len(self._reading), sum(size for _, size in self._reading.values())

    def want(self, digest: str, order: Order) -> None:
        """It is to be read, in its turn or in that of whoever wanted it first."""
        if digest not in self._reading:
            self._wanted[digest] = min(order, self._wanted.get(digest, order))

    def drop(self, digest: str) -> None:
        """Nobody wants it any more; one that is being read is read to its end."""
        self._wanted.pop(digest, None)

    def start(self, path_of: Callable[[str], str | None], has_room: Callable[[int], bool]) -> None:
        """Begin to read, in order, as much as threads, bytes and the place for them allow; those without a
        path are dropped."""
        while self._wanted and len(self._reading) < THREADS:
            digest = min(self._wanted, key=self._wanted.__getitem__)
            path = path_of(digest)
            if path is None:
                del self._wanted[digest]
                continue
            size = _size(path)
            count, read = self.reading
            if (count and read + size > MOST_BYTES) or not has_room(size):
                return
            del self._wanted[digest]
            self._reading[digest] = self._threads.submit(self._read, path, digest), size

    def finished(self) -> Iterator[tuple[str, Future[PackedAdapter]]]:
        """What has been read, or can't be."""
        for digest in [digest for digest, (future, _) in self._reading.items() if future.done()]:
            yield digest, self._reading.pop(digest)[0]

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _size(path: str) -> int:
    try:
        return (Path(path) / TENSOR_FILE).stat().st_size
    except OSError:  # whoever reads it says what is wrong
        return 0
