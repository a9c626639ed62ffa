"""The simulated engine on a device that a test can work out by hand: a floor and a price per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simulation.engine import SimulatedEngine

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.scheduler import SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.span import InferenceSpan, TrainingSpan
from coserve.core.step_plan import StepPlan
from coserve.core.training_sequence import TrainingPass, TrainingSequence, TrainingUnit

STEP_FLOOR, PER_TOKEN, PER_UNIT_TOKEN = 3e-3, 1e-4, 1e-5


class LinearCosts:
    """A step with requests costs a floor; tokens, and those of a unit, have their price."""

    layers = 2
    overhead = launch = 0.0
    calls_beside = 0

    def forward(
        self, inference: Sequence[InferenceSpan], windows: Sequence[TrainingSpan]
    ) -> tuple[float, float]:
        floor = STEP_FLOOR if inference else 0.0
        return floor + PER_TOKEN * (sum(s.length for s in inference) + sum(s.length for s in windows)), 0.0

    def unit(self, kind: str, tokens: int, context: int) -> float:
        return PER_UNIT_TOKEN * tokens * (2.0 if kind == "layer_c" else 1.0)


class Simulation(SimulatedEngine):
    """Requests' tokens are 0, 1, 2, ...; plans and their durations are kept."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_tokens: int = 64,
        prefix_caching: bool = False,
        tpot: float = 0.0,
        headroom: int = 4,
    ) -> None:
        self.slots = AdapterSlots(64, 4)
        super().__init__(
            LinearCosts(),
            SchedulerLimits(max_num_seqs, max_tokens, block_size, headroom, LinearCosts.layers),
            BlockPool(blocks, PrefixCache() if prefix_caching else None),
            LatencyTargets(tpot=tpot),
            self._acquire,
            self.slots.release,
        )
        self.plans: list[StepPlan] = []
        self.durations: list[float] = []

    def _acquire(self, key: str) -> bool:
        if key not in self.slots:
            return False
        self.slots.acquire(key)
        return True

    def request(
        self,
        name: str,
        prompt: int | list[int],
        output: int,
        *,
        adapter: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        ids = list(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(
            name,
            ids,
            SamplingParams(max_tokens=output),
            adapter=adapter,
            priority=priority,
            arrival=self.now + len(self.plans) * 1e-9,
            cache_salt=cache_salt,
            max_model_len=10_000,
        )
        self.scheduler.add(request)
        return request

    def job(
        self,
        name: str,
        microbatches: list[int],
        *,
        slabs: int | tuple[int, ...] = 8,
        head: int = 0,
        window: int = 0,
        priority: int = 0,
        reference: bool = False,
    ):
        """A job's optimizer step: microbatches of so many tokens, two layers each; slabs by level;
        `reference`: the base scores each first."""
        level_slabs = (slabs,) * 5 if isinstance(slabs, int) else slabs
        sequences = []
        for index, tokens in enumerate(microbatches):
            widths = [min(64, tokens - start) for start in range(0, tokens, 64)]
            units = [TrainingUnit("loss", w) for w in widths]
            units += [TrainingUnit("layer", w, height) for height in (1, 0) for w in widths]
            passes = [TrainingPass(name, tuple(units), trains=True)]
            if reference:
                passes.insert(0, TrainingPass(None, tuple(TrainingUnit("score", w) for w in widths)))
            sequences.append(
                TrainingSequence(
                    f"{name}/{index}",
                    name,
                    index,
                    tokens,
                    tuple(passes),
                    level_slabs=level_slabs,
                    head_slabs=head,
                    window_tokens=window,
                )
            )
        self.scheduler.training.submit(name, sequences, priority)
        return sequences

    def step(self, next_arrival: float = math.inf) -> StepPlan:
        plan = super().step(next_arrival)
        self.plans.append(plan)
        self.durations.append(self.now - self.began)
        return plan

    def run(self, most: int = 2000) -> None:
        """Step until nothing is owed."""
        for _ in range(most):
            if not self.scheduler.has_requests and not self.scheduler.training.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {most} steps")
