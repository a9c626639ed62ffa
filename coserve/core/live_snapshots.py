"""Adapters in training that requests read: which optimizer step of which job, and who still reads it.

A request for a job's live adapter gets the *snapshot* (job, step) of the last committed step and keeps it to
its end. While that step is the newest the snapshot reads the job's own rows. When the next step is committed
and somebody still reads, the snapshot keeps the old rows and the job goes on in rows that were set aside with
the first reader; with no reader the job writes in place. So nothing is ever copied, and no commit waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.errors import Unavailable

MOST_HELD = 2  # snapshots of one job with rows of their own: one that drains, one that takes new readers


@dataclass(slots=True)
class _Snapshot:
    job_id: str
    block_keys: set[bytes] = field(default_factory=set)  # of the KV that its requests leave in the cache


class LiveSnapshots:
    """Snapshots by key, `JOB:live@STEP`: what stands for the adapter in `slots` and in the prefix cache."""

    def __init__(self, slots: AdapterSlots, blocks: BlockPool) -> None:
        self._slots = slots
        self._blocks = blocks
        self._snapshots: dict[str, _Snapshot] = {}
        self._newest: dict[str, str] = {}  # job -> the snapshot that reads its rows, or did at this step
        self._held: dict[str, list[str]] = {}  # job -> snapshots with rows of their own, oldest first

    def __contains__(self, key: object) -> bool:
        return key in self._snapshots

    def take(self, job_id: str, step: int) -> str:
        """One more reader of the job's weights as of `step`, the last committed; returns the snapshot's key.

        While MOST_HELD older snapshots have readers, or no rows are free for the next step, it is the newest
        of those. Raises Unavailable when there is none either.
        """
        key = f"{job_id}:live@{step}"
        if key not in self._slots:
            held = self._held.get(job_id, [])
            if len(held) < MOST_HELD and self._slots.borrow(key, job_id):
                self._snapshots.setdefault(key, _Snapshot(job_id))
                self._newest[job_id] = key
            elif held:
                key = held[-1]
            else:
                raise Unavailable(
                    "All adapter rows are in use; an adapter in training needs some to be read. "
                    "Try again, or raise --max-loras.",
                    param="model",
                )
        self._slots.acquire(key)
        return key

    def release(self, key: str, block_keys: Iterable[bytes]) -> None:
        """A reader has ended, which left blocks with these keys. Rows and KV of an older step go with its
        last reader."""
        snapshot = self._snapshots[key]
        snapshot.block_keys.update(block_keys)
        if len(snapshot.block_keys) > 2 * self._blocks.num_blocks:
            snapshot.block_keys = self._blocks.known(snapshot.block_keys)
        self._slots.release(key)
        if key not in self._slots and self._newest.get(snapshot.job_id) != key:
            self._forget(key)

    def part(self, job_id: str) -> bool:
        """The job leaves the step of its newest snapshot, by the next one or by its end: whoever reads keeps
        the rows. True when somebody does, and the job has others."""
        key = self._newest.pop(job_id, None)
        if key is None:
            return False
        if key not in self._slots:
            self._forget(key)
            return False
        self._slots.part(key)
        self._held.setdefault(job_id, []).append(key)
        return True

    def _forget(self, key: str) -> None:
        """Nobody reads this step any more, and nobody will."""
        snapshot = self._snapshots.pop(key)
        self._blocks.forget(snapshot.block_keys)
        held = self._held.get(snapshot.job_id, [])
        if key in held:
            held.remove(key)
        if not held:
            self._held.pop(snapshot.job_id, None)
