"""Where each adapter's weights are: rows on the device, a copy in host memory, or only its files on disk.

Files are read in a thread of their own, so no step waits for a load; weights move to the device between two
steps. The device tier is `core.AdapterSlots`; the host tier keeps the most recently used ones.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from coserve.core.adapter_slots import AdapterSlots
from coserve.errors import CoserveError, FailedPrecondition, InternalError, NotFound
from coserve.kernels.linear import PackedLinear
from coserve.lora.adapter import HostAdapter, load_adapter
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.config import ModelConfig

logger = logging.getLogger(__name__)

OnLoaded = Callable[[CoserveError | None], None]


@dataclass
class KnownAdapter:
    """An adapter that somebody asked for: where its files are, and who waits for them."""

    name: str
    path: str
    pinned: bool = False
    loading: Future[HostAdapter] | None = None
    waiters: list[OnLoaded] = field(default_factory=list)
    error: CoserveError | None = None
    unloaded: bool = False  # asked for while its files were still being read


class AdapterTiers:
    """Loads, places, evicts. Keys are digests: an adapter's weights never change under its key."""

    def __init__(
        self,
        config: ModelConfig,
        pool: AdapterPool,
        slots: AdapterSlots,
        max_host: int,
        base_head: PackedLinear | None = None,
    ) -> None:
        self.swaps: Counter[str] = Counter()
        self._config = config
        self._pool = pool
        self._slots = slots
        self._max_host = max_host
        self._base_head = base_head
        self._known: dict[str, KnownAdapter] = {}
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")

    @property
    def is_loading(self) -> bool:
        return any(known.loading is not None for known in self._known.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in host memory."""
        return sum(adapter.nbytes for adapter in self._host.values())

    def name(self, digest: str) -> str:
        """The name an adapter was asked for by; of a snapshot in training (core/live_snapshots.py) too."""
        known = self._known.get(digest)
        return known.name if known else digest.partition("@")[0]

    def tiers(self) -> dict[str, str]:
        """Digest -> "device" or "host" for all that are not on disk only."""
        found = {digest: "host" for digest in self._host}
        found.update({key: "device" for key in self._slots.keys if key in self._known})
        return found

    def know(self, digest: str, name: str, path: str) -> None:
        """Remember where an adapter's files are."""
        known = self._known.setdefault(digest, KnownAdapter(name, path))
        known.path, known.unloaded = path, False

    def adopt(self, digest: str, job_id: str) -> None:
        """A job that has ended left its rows, if nobody took them since: they are the known adapter's now."""
        if not self._slots.is_idle(job_id):
            return
        if digest in self._slots:
            self._slots.unload(job_id)
        else:
            self._slots.rename(job_id, digest)
            self.swaps["publish"] += 1

    def load(self, digest: str, pinned: bool, on_loaded: OnLoaded) -> None:
        """Bring a known adapter in; `on_loaded` hears None, or why it can't be had."""
        known = self._known[digest]
        known.pinned = pinned
        if digest in self._slots:
            self._slots.revive(digest)
            self._slots.pin(digest, pinned)
            on_loaded(None)
        elif digest in self._host:
            self._place(digest)
            on_loaded(None)
        else:
            known.waiters.append(on_loaded)
            self._start(known)

    def acquire(self, digest: str) -> bool:
        """True when the adapter is on the device, with one reference taken; else its load has begun."""
        if digest in self._slots or (digest in self._host and self._place(digest)):
            self._slots.acquire(digest)
            if digest in self._known and self._known[digest].unloaded:
                self._host.pop(digest, None)
            return True
        if digest not in self._host:
            self._start(self._known[digest])
        return False

    def release(self, digest: str) -> None:
        """Give a reference back."""
        if self._slots.release(digest):
            self.swaps["unload"] += 1

    def unload(self, digest: str) -> None:
        """Free device rows (with their last reader) and the host copy.

        Raises NotFound for an adapter that was never loaded.
        """
        if digest not in self._known:
            raise NotFound("The engine has no such adapter.", param="lora_name")
        if digest in self._slots and self._slots.unload(digest):
            self.swaps["unload"] += 1
        self._known[digest].unloaded = True
        self._host.pop(digest, None)

    def poll(self) -> dict[str, CoserveError]:
        """Take in what the reader thread has finished; returns the digests that failed, with the reason."""
        failed: dict[str, CoserveError] = {}
        for digest, known in self._known.items():
            if known.loading is None or not known.loading.done():
                continue
            try:
                self._host[digest] = known.loading.result()
                known.error = None
            except CoserveError as error:
                known.error = failed[digest] = error
            except Exception:
                logger.exception("adapter %s could not be read", known.name)
                known.error = failed[digest] = InternalError("The adapter's files could not be read.")
            known.loading = None
            if known.error is None:
                self._place(digest)
            for waiter in known.waiters:
                waiter(known.error)
            known.waiters.clear()
        while len(self._host) > self._max_host:
            self._host.popitem(last=False)
        return failed

    def close(self) -> None:
        """Stop the reader thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _start(self, known: KnownAdapter) -> None:
        if known.loading is None:
            known.loading = self._reader.submit(
                load_adapter, known.path, self._config, base_head=self._base_head
            )

    def _place(self, digest: str) -> bool:
        """Copy a host adapter into rows; False while all rows are in use."""
        adapter = self._host[digest]
        if adapter.rank > self._slots.max_rows:
            raise FailedPrecondition(f"rank {adapter.rank} is over the server's rows for adapters")
        got = self._slots.allocate(digest, adapter.rank, pinned=self._known[digest].pinned)
        if got is None:
            return False
        slot, evicted = got
        self._pool.write(slot.rows, adapter)
        self._host.move_to_end(digest)
        slot.doomed = self._known[digest].unloaded
        self.swaps["load"] += 1
        self.swaps["evict"] += len(evicted)
        return True
