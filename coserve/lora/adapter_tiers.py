"""Where each adapter's weights are: rows on the device, a copy in host memory, or only its files on disk.

Nothing is kept of an adapter that is on disk alone and that nobody asks for, so the number registered costs
no memory here. Files are read by threads (adapter_loader.py) as soon as a request comes; weights move to the
device between steps, a few megabytes each. The device tier is `core.AdapterSlots`; host memory keeps as many
as count and bytes allow; what was used least of late goes first from both.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.adapter_turns import AdapterTurns
from coserve.errors import CoserveError, FailedPrecondition, InternalError, NotFound
from coserve.kernels.linear import PackedLinear
from coserve.lora.adapter_loader import AdapterLoader, Order
from coserve.lora.adapter_pool import AdapterPool
from coserve.lora.packed_adapter import PackedAdapter, load_packed
from coserve.models.config import ModelConfig

logger = logging.getLogger(__name__)

OnLoaded = Callable[[CoserveError | None], None]

STEP_BYTES = 16 << 20  # copied to the device in a step that others wait for, while requests wait for it,
UNASKED_BYTES = 4 << 20  # and while nobody does: less than a millisecond
FEWEST_SWEPT = 64


@dataclass(slots=True)
class KnownAdapter:
    """An adapter in memory, or one that somebody asks for: where its files are (`paths` with the number of
    requests that came with each, whose files stay as long as they do), and who waits for it."""

    name: str
    path: str
    paths: Counter[str] = field(default_factory=Counter)
    pinned: bool = False
    waiters: list[OnLoaded] = field(default_factory=list)
    unloaded: bool = False  # it goes as soon as nobody reads it


class AdapterTiers:
    """Loads, places, evicts. Keys are digests: an adapter's weights never change under its key. At most
    `max_in_use` are read by requests at a time (core/adapter_turns.py)."""

    def __init__(
        self,
        config: ModelConfig,
        pool: AdapterPool,
        slots: AdapterSlots,
        max_in_use: int,
        max_host: int,
        max_host_bytes: int,
        base_head: PackedLinear | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.swaps: Counter[str] = Counter()
        self.found_in: Counter[str] = Counter()  # requests by the tier that their adapter was in
        self.seconds = 0.0  # that the engine's loop has spent here
        self._pool = pool
        self._slots = slots
        self._max_in_use = max_in_use
        self._max_host = max_host
        self._max_host_bytes = max_host_bytes
        self._known: dict[str, KnownAdapter] = {}
        self._sweep_at = FEWEST_SWEPT
        self._requests: dict[str, tuple[str, str]] = {}  # id -> digest, path
        self._host: dict[str, PackedAdapter] = {}
        self._host_changes = 0
        self._writers: dict[str, Iterator[int]] = {}
        self._unplaced_pins: set[str] = set()
        self._refused: set[str] = set()  # in this pass over the queue
        self._left: float = STEP_BYTES  # bytes that this step may still copy
        self._turns = AdapterTurns(slots, max_in_use, self._known.__contains__, clock)

        def read(path: str, digest: str) -> PackedAdapter:
            rows = slots.max_rows
            return load_packed(path, config, pool.dtype, digest=digest, max_rows=rows, base_head=base_head)

        self._loader = AdapterLoader(read)

    # ------------------------------------------------------------------ what is where

    @property
    def is_loading(self) -> bool:
        """Files are being read, or weights being written."""
        return self._loader.is_busy or bool(self._writers)

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in host memory."""
        return sum(adapter.nbytes for adapter in self._host.values())

    @property
    def changes(self) -> tuple[int, int]:
        """Differs when `tiers` may."""
        return self._slots.changes, self._host_changes

    def name(self, digest: str) -> str:
        """The name an adapter was asked for by; of a snapshot in training (core/live_snapshots.py) too."""
        known = self._known.get(digest)
        return known.name if known else digest.partition("@")[0]

    def tiers(self) -> dict[str, str]:
        """Digest -> "device" or "host" for all that are not on disk only."""
        found = {digest: "host" for digest in self._host}
        found.update({key: "device" for key in self._slots.keys if key in self._known})
        return found

    # ------------------------------------------------------------------ requests

    def want(self, request_id: str, digest: str, name: str, path: str, order: Order) -> None:
        """A request for this adapter has come; what it needs is read before its turn."""
        known = self.know(digest, name, path)
        known.paths[path] += 1
        self._requests[request_id] = digest, path
        if digest in self._slots:
            self.found_in["device"] += 1
        elif digest in self._host:
            self.found_in["host"] += 1
        else:
            self.found_in["disk"] += 1
            self._loader.want(digest, order)

    def unwant(self, request_id: str) -> None:
        """A request has ended, whether it ran or not."""
        digest, path = self._requests.pop(request_id, ("", ""))
        known = self._known.get(digest)
        if known is None:
            return
        known.paths[path] -= 1
        if known.paths[path] <= 0:
            del known.paths[path]
        if not known.paths:
            self._turns.forget(digest)
            if not (known.waiters or known.pinned):
                self._loader.drop(digest)
            if known.unloaded and self._slots.readers(digest) == 0:
                self._free(digest)

    def acquire(self, digest: str) -> bool:
        """True when the adapter is on the device, with one reference taken. To be asked in the queue's order,
        in passes that `poll` begins."""
        if digest not in self._known:  # one in training, whose rows a request has taken already
            self._slots.acquire(digest)
            return True
        if digest in self._refused or self._turns.is_closed(digest):
            return False
        if not self._is_at_hand(digest):
            self._refused.add(digest)
            return False
        self._turns.forget(digest)
        self._slots.acquire(digest)
        if self._known[digest].unloaded:
            self._drop_copy(digest)
        return True

    def release(self, digest: str) -> None:
        """Give a reference back."""
        if self._slots.release(digest):
            self.swaps["unload"] += 1

    def _is_at_hand(self, digest: str) -> bool:
        if digest not in self._slots:
            adapter = self._host.get(digest)
            if adapter is None:
                self._loader.want(digest, (0, 0.0, ""))  # it is this one's turn
                return False
            began = time.perf_counter()
            is_placed = self._turns.has_room(digest) and self._place(digest)
            self.seconds += time.perf_counter() - began
            if not is_placed:
                self._turns.wait(digest, adapter.rank)
                return False
        elif not self._turns.has_room(digest):
            self._turns.wait(digest, len(self._slots.rows(digest)))
            return False
        return self._slots.is_ready(digest)

    # ------------------------------------------------------------------ orders of the server

    def know(self, digest: str, name: str, path: str) -> KnownAdapter:
        """Remember where an adapter's files are, as long as it matters."""
        if len(self._known) >= self._sweep_at:
            self._sweep()
        known = self._known.setdefault(digest, KnownAdapter(name, path))
        known.path, known.unloaded = path, False
        return known

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
        began = time.perf_counter()
        self._load(digest, pinned, on_loaded)
        self.seconds += time.perf_counter() - began

    def _load(self, digest: str, pinned: bool, on_loaded: OnLoaded) -> None:
        known = self._known[digest]
        others = sum(other.pinned for key, other in self._known.items() if key != digest)
        if pinned and others >= self._max_in_use - 1:
            on_loaded(
                FailedPrecondition(
                    f"--max-loras {self._max_in_use} has room for {self._max_in_use - 1} pinned adapters "
                    f"beside one for all others, and {others} are pinned; unpin one or raise it.",
                    param="pinned",
                )
            )
            return
        known.pinned = pinned
        self._unplaced_pins.discard(digest)
        if digest in self._slots:
            self._slots.revive(digest)
            self._slots.pin(digest, pinned)
            on_loaded(None)
        elif digest in self._host:
            if not self._place(digest) and pinned:
                self._unplaced_pins.add(digest)
            on_loaded(None)
        else:
            known.waiters.append(on_loaded)
            self._loader.want(digest, (0, time.time(), ""))

    def unload(self, digest: str) -> None:
        """Free device rows (with their last reader) and the host copy.

        Raises NotFound for an adapter that was never loaded.
        """
        known = self._known.get(digest)
        if known is None:
            raise NotFound("The engine has no such adapter.", param="lora_name")
        known.unloaded, known.pinned = True, False
        self._unplaced_pins.discard(digest)
        self._free(digest)

    def _free(self, digest: str) -> None:
        """Its rows go, now or with their last reader, and its copy."""
        if digest in self._slots and self._slots.unload(digest):
            self.swaps["unload"] += 1
            self._writers.pop(digest, None)
        self._drop_copy(digest)

    def close(self) -> None:
        """Stop the threads that read."""
        self._loader.close()

    # ------------------------------------------------------------------ between two steps

    def poll(self, busy: bool) -> dict[str, CoserveError]:
        """Take in what has been read, copy to the device (all of it, or where others run, `busy`, a part),
        have more read. Returns the digests that failed, with the reason. Begins a pass over the queue."""
        began = time.perf_counter()
        self._turns.begin()
        self._refused.clear()
        self._left = STEP_BYTES if busy else float("inf")
        failed: dict[str, CoserveError] = {}
        for digest, future in self._loader.finished():
            error = self._take_in(digest, future)
            if error is not None:
                failed[digest] = error
        for digest in list(self._unplaced_pins):
            if digest not in self._slots and self._host.get(digest) is not None and self._place(digest):
                self._unplaced_pins.discard(digest)
        for digest in list(self._writers):
            self._write(digest)
        if self._loader.has_wishes:
            self._loader.start(self._path_of, self._has_room)
        self.seconds += time.perf_counter() - began
        return failed

    def _take_in(self, digest: str, future: Future[PackedAdapter]) -> CoserveError | None:
        known = self._known.get(digest)
        error: CoserveError | None = None
        try:
            rows = future.result()
        except CoserveError as refused:
            error = refused
        except Exception:
            logger.exception("adapter %s could not be read", self.name(digest))
            error = InternalError("The adapter's files could not be read.")
        if known is None:
            return error
        waiters, known.waiters = known.waiters, []
        if error is None and (known.paths or not known.unloaded):
            self._keep(digest, rows)
            if (waiters or known.pinned) and not self._place(digest) and known.pinned:
                self._unplaced_pins.add(digest)
        for waiter in waiters:
            waiter(error)
        if error is not None:
            known.pinned = known.pinned and digest in self._slots
        return error

    def _place(self, digest: str) -> bool:
        """Give a host adapter rows and begin to write them; False while all rows are in use."""
        adapter, known = self._host[digest], self._known[digest]
        got = self._slots.allocate(digest, adapter.rank, pinned=known.pinned, is_written=False)
        if got is None:
            return False
        slot, evicted = got
        slot.doomed = known.unloaded
        self.swaps["load"] += 1
        self.swaps["evict"] += len(evicted)
        self._writers[digest] = self._pool.write_pieces(slot.rows, adapter)
        self._write(digest)
        return True

    def _write(self, digest: str) -> None:
        """Go on copying to the device, as far as the step's bytes go."""
        writer, written = self._writers[digest], 0
        limit = self._left if self._known[digest].paths else min(self._left, UNASKED_BYTES)
        if self._left == float("inf"):
            limit = self._left
        while written < limit:
            piece = next(writer, None)
            if piece is None:
                del self._writers[digest]
                self._slots.written(digest)
                break
            written += piece
        self._left -= written

    # ------------------------------------------------------------------ host memory

    def _path_of(self, digest: str) -> str | None:
        """Where its files are now; None when nobody wants them any more."""
        known = self._known.get(digest)
        if known is None or digest in self._host or digest in self._slots:
            return None
        if known.paths:
            return next(iter(known.paths))
        return known.path if known.waiters or known.pinned else None

    def _is_needed(self, digest: str) -> bool:
        """Requests wait for it to come to the device from here."""
        known = self._known.get(digest)
        return known is not None and bool(known.paths) and digest not in self._slots

    def _has_room(self, size: int) -> bool:
        """Whether one more can be read without others having to go that are waited for; one always can."""
        count, read = self._loader.reading
        needed = [adapter for digest, adapter in self._host.items() if self._is_needed(digest)]
        if not (count or needed):
            return True
        held = sum(adapter.nbytes for adapter in needed) + read
        return count + len(needed) < self._max_host and held + size <= self._max_host_bytes

    def _keep(self, digest: str, rows: PackedAdapter) -> None:
        self._host[digest] = rows
        self._host_changes += 1
        held = self.host_bytes
        while len(self._host) > self._max_host or held > self._max_host_bytes:
            others = [d for d in self._host if d != digest and not self._is_needed(d)]
            if not others:
                return
            victim = min(others, key=self._slots.use.of)
            held -= self._host.pop(victim).nbytes

    def _drop_copy(self, digest: str) -> None:
        if self._host.pop(digest, None) is not None:
            self._host_changes += 1

    def _sweep(self) -> None:
        """Forget all that is on disk alone and that nobody asks for."""
        for digest, known in list(self._known.items()):
            asked = known.paths or known.waiters or known.pinned
            if not (asked or digest in self._slots or digest in self._host or digest in self._loader):
                del self._known[digest]
        self._sweep_at = max(FEWEST_SWEPT, 2 * len(self._known))
