"""What a job, or a model that is trained by calls, must have before it starts, and holds until it ends:
adapter rows, memory outside the pool."""

from __future__ import annotations

from typing import NamedTuple

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.live_snapshots import LiveSnapshots
from coserve.lora.adapter_pool import AdapterPool
from coserve.models.config import ModelConfig
from coserve.training.job import JobSpec
from coserve.training.job_memory import memory_of, too_large
from coserve.training.running_job import RunningJob


class Lack(NamedTuple):
    """Why a job can't start now: of which `kind` ("rows", "memory"), in words, and whether it `passes` when
    others end."""

    kind: str
    reason: str
    passes: bool = True


class JobPlaces:
    """Hands them out; `memory` are the bytes that jobs may hold outside the pool, None: any number."""

    def __init__(
        self,
        model: ModelConfig,
        pool: AdapterPool,
        slots: AdapterSlots,
        live: LiveSnapshots,
        memory: int | None = None,
    ) -> None:
        self._model, self._pool, self._slots, self._live = model, pool, slots, live
        self._left = memory
        self._held: dict[str, int] = {}  # bytes by job
        self._needs: dict[str, int] = {}  # of jobs that wait

    def take(self, spec: JobSpec) -> Lack | None:
        """All that a job needs, or what it lacks. Raises InvalidRequest where its settings don't hold."""
        need = self._needs.get(spec.job_id)
        if need is None:
            need = self._needs[spec.job_id] = memory_of(spec, self._model).total
        lack = self._lacks_memory(need)
        if lack is None and not self._take_rows(spec):
            rank = RunningJob.rank(spec)
            lack = Lack(
                "rows",
                f"The job waits for {rank} adapter rows, which other jobs and adapters in use hold; "
                "--max-loras and --max-lora-rank set how many there are.",
            )
        if lack is None:
            self._held[spec.job_id] = self._needs.pop(spec.job_id)
        return lack

    def forget(self, job_id: str) -> None:
        """A job that waited won't start."""
        self._needs.pop(job_id, None)

    def rows(self, spec: JobSpec) -> tuple[list[int], list[int] | None]:
        """The rows of the job's adapter, and of the frozen copy of its start if it has one."""
        reference = RunningJob.reference_key(spec)
        return self._slots.rows(spec.job_id), self._slots.rows(reference) if reference else None

    def next_rows(self, job_id: str) -> list[int]:
        """Where a job's next weights go: requests that read the last ones keep theirs."""
        self._live.part(job_id)
        return self._slots.rows(job_id)

    def free(self, spec: JobSpec, *, keep: bool = False) -> None:
        """The job has ended. With `keep` its adapter stays in its rows until they are wanted, or until the
        version that it becomes takes them over."""
        self._held.pop(spec.job_id, None)
        for key in (spec.job_id, RunningJob.reference_key(spec)):
            if key is None:
                continue
            if keep and key == spec.job_id:
                self._slots.pin(key, False)
            else:
                self._pool.clear(self._slots.rows(key))
                self._slots.unload(key)
            self._slots.release(key)

    def _lacks_memory(self, need: int) -> Lack | None:
        if self._left is None:
            return None
        if need > self._left:
            return Lack("memory", too_large(need, self._left), passes=False)
        free = self._left - sum(self._held.values())
        if need <= free:
            return None
        return Lack(
            "memory",
            f"The job waits for memory: its weights, gradients and optimizer state take {need} bytes, and "
            f"{max(0, free)} of the {self._left} that jobs may have are free.",
        )

    def _take_rows(self, spec: JobSpec) -> bool:
        """Rows for the job's adapter, and for a frozen copy of its start if it needs one; all or none."""
        keys = [spec.job_id, RunningJob.reference_key(spec)]
        taken: list[str] = []
        for key in keys:
            if key is None:
                continue
            self._slots.unload(key)  # what an earlier run of the job has left
            if self._slots.allocate(key, RunningJob.rank(spec), pinned=True) is None:
                for other in taken:
                    self._slots.unload(other)
                return False
            taken.append(key)
        for key in taken:
            self._slots.acquire(key)
        return True
