"""What the engine counts, handed to the server in snapshots a few times a second."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from coserve.core.request import Request
from coserve.core.step_plan import StepPlan
from coserve.engine import messages as m
from coserve.engine.memory_ledger import MemoryLedger

if TYPE_CHECKING:
    from coserve.engine.engine import Engine

INTERVAL = 0.25  # seconds between two unasked snapshots
SAVE_EVERY = 300.0  # seconds between two snapshots with the latency model
SHARE_HALF_LIFE = 64  # steps


class StatsKeeper:
    """Counts steps; a snapshot carries gauges of now and what was counted since the one before."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ledger = MemoryLedger(engine)
        self._steps: list[m.StepTiming] = []
        self._waits: list[tuple[str, float]] = []
        self._last_step = ("none", 0.0)  # its kind, and time.time() at its end
        self._sent_at = 0.0
        self._preemptions = 0
        self._prefix = (0, 0)
        self._reclaims = (0, 0)
        self._swaps: Counter[str] = Counter()
        self._found_in: Counter[str] = Counter()
        self._adapter_seconds = 0.0
        self._tiers_told = (0, 0)
        self._share = 0.0
        self._saved_at = time.monotonic()

    def arrived(self, arrival: float) -> None:
        """A request that reached the server at `arrival` (time.time()) is taken in now."""
        now, (kind, ended) = time.time(), self._last_step
        self._waits.append((kind if ended >= arrival else "none", max(0.0, now - arrival)))

    def step_done(self, plan: StepPlan, seconds: float, forward: float) -> None:
        """A step has ended, whose batch with requests took `forward` seconds; sends a snapshot when one is
        due."""
        training_seconds = self._engine.jobs.step_seconds
        if not plan.empty or training_seconds > 0.0:
            share = min(1.0, training_seconds / seconds) if seconds > 0 else 0.0
            self._share += (share - self._share) / SHARE_HALF_LIFE
            self._last_step = (plan.kind, time.time())
            self._steps.append(
                m.StepTiming(
                    plan.kind, seconds, plan.training_budget, plan.predicted, forward, training_seconds,
                    plan.inference_tokens,
                )
            )
        now = time.monotonic()
        rests = not (self._engine.has_work or self._engine.is_loading)
        if now - self._sent_at >= INTERVAL or rests:
            self._sent_at = now
            self._engine.send(self.snapshot(0, with_costs=now - self._saved_at >= SAVE_EVERY))

    @property
    def share(self) -> float:
        """Training's share of the device's time, 0-1, over the last steps."""
        return self._share

    def snapshot(self, call_id: int, *, with_costs: bool = False) -> m.EngineStats:
        """Gauges now, counts since the last snapshot; what the latency model has learnt where that is asked
        for."""
        engine = self._engine
        if with_costs:
            self._saved_at = time.monotonic()
        scheduler, blocks, adapters = engine.scheduler, engine.blocks, engine.adapters
        queue = scheduler.training
        forward, backward = engine.jobs.take_token_counts()
        held = self._ledger.held()
        stats = m.EngineStats(
            call_id=call_id,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_deferred=scheduler.num_deferred,
            kv_usage=blocks.num_kv_blocks / blocks.num_blocks,
            memory_bytes=self._ledger.owners(held),
            resident_bytes=held.resident,
            untouched_bytes=held.untouched,
            adapter_tiers=self._new_tiers(always=call_id != 0),
            running_adapters=self._by_adapter(scheduler.running),
            waiting_adapters=self._by_adapter(scheduler.waiting),
            least_targets=engine.admission.least_targets(),
            steps=self._steps,
            arrival_waits=self._waits,
            preemptions=scheduler.num_preemptions - self._preemptions,
            prefix_queries=scheduler.prefixes.queries - self._prefix[0],
            prefix_hits=scheduler.prefixes.hits - self._prefix[1],
            finetune_forward_tokens=forward,
            finetune_backward_tokens=backward,
            finetune_share=self._share if engine.jobs.has_work else 0.0,
            activation_policies=queue.policies(),
            downgrades=queue.num_downgrades - self._reclaims[0],
            evictions=queue.num_evictions - self._reclaims[1],
            latency_model=engine.saved_costs() if with_costs else "",
            swaps=dict(adapters.swaps - self._swaps),
            adapters_found_in=dict(adapters.found_in - self._found_in),
            adapter_seconds=adapters.seconds - self._adapter_seconds,
        )
        self._steps, self._waits = [], []
        self._preemptions = scheduler.num_preemptions
        self._prefix = (scheduler.prefixes.queries, scheduler.prefixes.hits)
        self._reclaims = (queue.num_downgrades, queue.num_evictions)
        self._swaps, self._found_in = adapters.swaps.copy(), adapters.found_in.copy()
        self._adapter_seconds = adapters.seconds
        return stats

    def _new_tiers(self, *, always: bool) -> dict[str, str] | None:
        """Which tier each adapter is in, where that has changed since it was last told unasked."""
        adapters = self._engine.adapters
        if always:
            return adapters.tiers()
        if adapters.changes == self._tiers_told:
            return None
        self._tiers_told = adapters.changes
        return adapters.tiers()

    def _by_adapter(self, requests: list[Request]) -> dict[str, int]:
        names = self._engine.adapters
        return dict(Counter(names.name(r.adapter) for r in requests if r.adapter is not None))
