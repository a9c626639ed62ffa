"""A device made of arithmetic: runs a scheduler's plans under a clock of its own."""

from __future__ import annotations

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.step_plan import StepPlan
from coserve.core.training_sequence import TrainingPass, TrainingSequence, TrainingUnit

STEP_FLOOR, PER_TOKEN, PER_UNIT_TOKEN = 3e-3, 1e-4, 1e-5


class Simulation:
    """Tokens are 0, 1, 2, ...; a step costs a floor plus a price per token."""

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
        self.pool = BlockPool(blocks, PrefixCache() if prefix_caching else None)
        self.model = LatencyModel()
        self.slots = AdapterSlots(64, 4)
        limits = SchedulerLimits(max_num_seqs, max_tokens, block_size, headroom)
        self.scheduler = Scheduler(
            limits, self.pool, self.model, LatencyTargets(tpot=tpot), self._acquire, self._release
        )
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.durations: list[float] = []

    def _acquire(self, key: str) -> bool:
        if key not in self.slots:
            return False
        self.slots.acquire(key)
        return True

    def _release(self, key: str) -> None:
        self.slots.release(key)

    def request(
        self,
        name: str,
        prompt: int | list[int],
        output: int,
        *,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Request:
        ids = list(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(
            name,
            ids,
            SamplingParams(max_tokens=output),
            adapter=adapter,
            priority=priority,
            arrival=self.now + len(self.plans) * 1e-9,
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
                    f"{name}/{index}", name, index, tokens, tuple(passes),
                    level_slabs=level_slabs, head_slabs=head, window_tokens=window,
                )
            )
        self.scheduler.training.submit(name, sequences, priority)
        return sequences

    def step(self) -> StepPlan:
        """Schedule, pretend to run, commit."""
        plan = self.scheduler.schedule(self.now)
        inference, context = plan.inference_tokens, plan.context_tokens
        seconds = STEP_FLOOR + PER_TOKEN * inference if plan.inference else 0.0
        self.scheduler.commit(plan)
        for span in plan.inference:
            if span.samples and not span.request.finished and span.request.append(7) is not None:
                self.scheduler.finish(span.request)
        rows = sum(span.length for span in plan.training_forward)
        if rows:
            self.model.observe_unit("forward", rows, PER_TOKEN * rows)
        else:
            self.model.observe_inference(inference, context, seconds)
        seconds += PER_TOKEN * rows
        for span in plan.training_forward:
            span.sequence.cursor += span.length
            self.scheduler.training.release_head(span.sequence)
            self.scheduler.training.charge(span.sequence.job_id, PER_TOKEN * span.length)
        for span in plan.training_backward:
            for index in range(span.start, span.start + span.length):
                unit, kind = span.sequence.units[index], span.sequence.unit_kind(index)
                cost = PER_UNIT_TOKEN * unit.tokens * (2.0 if kind == "layer_c" else 1.0)
                self.model.observe_unit(kind, unit.tokens, cost)
                self.scheduler.training.charge(span.sequence.job_id, cost)
                seconds += cost
            for _ in range(span.length):
                span.sequence.pay_unit()
            if span.sequence.done:
                self.scheduler.training.release(span.sequence)
        self.now += seconds
        self.plans.append(plan)
        self.durations.append(seconds)
        return plan

    def run(self, most: int = 2000) -> None:
        """Step until nothing is owed."""
        for _ in range(most):
            if not self.scheduler.has_requests and not self.scheduler.training.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {most} steps")
