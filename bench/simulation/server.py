"""A server in simulated time: requests arrive by a trace, adapters are loaded, endless jobs train.

The scheduler, the latency model and the pool are coserve/core's own (engine.py); the pool's size, the units
and the activations are those of the shape (device.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from common import quantile
from simulation.adapters import SimulatedTiers
from simulation.device import CostModel, Device
from simulation.engine import SimulatedEngine
from traces import MOONCAKE_BLOCK, Arrival

from coserve.core.adapter_slots import AdapterSlots
from coserve.core.block_pool import BlockPool
from coserve.core.prefix_cache import PrefixCache
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.scheduler import SchedulerLimits
from coserve.core.slo import LatencyTargets
from coserve.core.step_plan import StepPlan
from coserve.core.training_sequence import TrainingPass, TrainingSequence
from coserve.errors import ConfigError
from coserve.models.config import ModelConfig
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import layer_units
from coserve.training.loss import head_units
from coserve.training.objectives import ROWS, split
from coserve.worker.kv_tensors import slab_bytes

BLOCK_SIZE = 16


@dataclass(frozen=True)
class TrainingJob:
    """An endless job: `microbatches` of `tokens` each in an optimizer step, all of them trained."""

    name: str = "job"
    tokens: int = 512
    microbatches: int = 2
    priority: int = 0


@dataclass
class Served:
    """One request's times, seconds of the simulated clock. `gaps` lie between its tokens."""

    arrival: Arrival
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """To the first token."""
        assert self.first is not None
        return self.first - self.arrival.time

    @property
    def tpot(self) -> float | None:
        """Mean gap; None for a single token."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None


@dataclass
class Sample:
    """State at a moment, for plots: queue lengths, step seconds, the training's part of the time since the
    last."""

    time: float
    running: int
    waiting: int
    step: float
    share: float


class Before(NamedTuple):
    """What had happened after so many seconds."""

    seconds: float = 0.0
    generated: int = 0
    trained: int = 0


@dataclass
class Outcome:
    """What a run gave."""

    seconds: float
    served: list[Served]
    pending: list[Served]  # arrived and not done
    trained_tokens: dict[str, int]
    steps: int
    training_seconds: float
    samples: list[Sample]
    errors: list[float]  # of the latency model on steps of inference alone, |measured / predicted - 1|
    waits: list[float]  # from an arrival to the step that could take it in
    preemptions: int
    evictions: int
    before: Before  # it was warm

    @property
    def unfinished(self) -> int:
        """How many requests were in hand at the end."""
        return len(self.pending)

    @property
    def generated_tokens(self) -> int:
        """Of all requests."""
        return sum(served.tokens for served in (*self.served, *self.pending)) - self.before.generated

    @property
    def pace(self) -> tuple[float, float]:
        """Tokens generated and trained a second, once warm."""
        seconds = self.seconds - self.before.seconds
        trained = sum(self.trained_tokens.values()) - self.before.trained
        return self.generated_tokens / seconds, trained / seconds

    @property
    def gaps(self) -> list[float]:
        """All inter-token latencies."""
        return [gap for served in self.served for gap in served.gaps]

    @property
    def ttfts(self) -> list[float]:
        """All times to the first token."""
        return [served.ttft for served in self.served]

    @property
    def tpots(self) -> list[float]:
        """Each request's mean gap."""
        return [served.tpot for served in self.served if served.tpot is not None]

    def goodput(self, tpot: float, ttft: float) -> float:
        """The part of the requests whose mean gap and first token kept their targets."""
        good = [s for s in self.served if (s.tpot or 0.0) <= tpot and s.ttft <= ttft]
        return len(good) / max(1, len(self.served))


class Simulator(SimulatedEngine):
    """One server. Requests draw one of `adapters` adapters by Zipf's law (0: the base alone)."""

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        *,
        targets: LatencyTargets | None = None,
        jobs: Sequence[TrainingJob] = (),
        adapters: int = 0,
        rank: int = 16,
        max_loras: int = 16,
        max_cpu_loras: int = 128,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        seed: int = 0,
    ) -> None:
        costs = CostModel(device, config, rank)
        self.config, self.device = config, device
        self._slab = slab_bytes(config, BLOCK_SIZE, torch.bfloat16)
        self.num_blocks = int((device.memory * 0.9 - costs.weight_bytes) // self._slab)
        if self.num_blocks < 64:
            needed = costs.weight_bytes / 1e9
            raise ConfigError(
                f"{needed:.0f} GB of weights leave no room for a cache in 0.9 of {device.name}'s "
                f"{device.memory / 1e9:.0f} GB: choose a smaller --shape or a larger --device",
                param="shape",
            )
        nbytes = costs.adapter_bytes
        slots = AdapterSlots(max_loras * rank, max_loras)
        self.tiers = SimulatedTiers(slots, rank, max_cpu_loras, nbytes / device.disk, nbytes / device.link)
        self._adapters = adapters
        self._draw = random.Random(f"simulator/{seed}")
        headroom = max(4, self.num_blocks // 8)
        super().__init__(
            costs,
            SchedulerLimits(max_num_seqs, max_num_batched_tokens, BLOCK_SIZE, headroom, config.num_layers),
            BlockPool(self.num_blocks, PrefixCache() if prefix_caching else None),
            targets or LatencyTargets(),
            lambda key: self.tiers.acquire(key, self.now),
            slots.release,
            lambda: self._draw.lognormvariate(0.0, device.noise),
        )
        self._counter = count()
        self._served: dict[str, Served] = {}
        self._done: list[Served] = []
        self.jobs = {job.name: job for job in jobs}
        self._owed = {job.name: self._work(job) for job in jobs}
        self._open: dict[str, list[TrainingSequence]] = {}
        self._trained = {job.name: 0 for job in jobs}
        self._waits: list[float] = []
        self._errors: list[float] = []
        for job in jobs:
            self._begin(job)

    # ------------------------------------------------------------------ what arrives

    def _add(self, arrival: Arrival) -> None:
        number = next(self._counter)
        prompt: list[int] = []
        for block in arrival.prefix:
            prompt += [block * 8191 + 17] * MOONCAKE_BLOCK
        del prompt[arrival.prompt_tokens :]
        prompt += [-number - 1] * (arrival.prompt_tokens - len(prompt))
        adapter = None
        if self._adapters:
            adapter = f"adapter-{min(int(self._draw.paretovariate(0.8)), self._adapters)}"
        request = Request(
            f"r{number}",
            prompt,
            SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
            adapter=adapter,
            arrival=arrival.time,
            max_model_len=1 << 30,
        )
        self._served[request.sequence_id] = Served(arrival)
        self._waits.append(self.now - arrival.time)
        self.scheduler.add(request)

    def _work(self, job: TrainingJob) -> tuple[TrainingPass, tuple[int, ...]]:
        """What each of its microbatches owes, and the slabs that it holds by level."""
        config, tokens = self.config, job.tokens
        levels = MicrobatchActivations.level_bytes(config, config.num_layers, tokens, torch.bfloat16, 0)
        loss = head_units("loss", split(0, tokens, ROWS)[::-1])
        units = loss + layer_units(tokens, config.num_layers)
        return TrainingPass(None, units, trains=True), tuple(-(-size // self._slab) for size in levels)

    def _begin(self, job: TrainingJob) -> None:
        owed, slabs = self._owed[job.name]
        sequences = self._open[job.name] = [
            TrainingSequence(
                f"{job.name}/{next(self._counter)}", job.name, index, job.tokens, (owed,), level_slabs=slabs
            )
            for index in range(job.microbatches)
        ]
        self.scheduler.training.submit(job.name, sequences, job.priority)

    # ------------------------------------------------------------------ what is done

    def run(
        self, arrivals: Sequence[Arrival], seconds: float, *, warm: float = 0.0, sample_every: float = 1.0
    ) -> Outcome:
        """Serve the arrivals (ordered by time) for so many simulated seconds, of which the `warm` first don't
        count for the pace."""
        taken, steps, samples, before = 0, 0, [], Before()
        due, mark = 0.0, (0.0, 0.0)
        while self.now < seconds:
            if before.seconds < warm <= self.now:
                generated = sum(served.tokens for served in (*self._done, *self._served.values()))
                before = Before(self.now, generated, sum(self._trained.values()))
            while taken < len(arrivals) and arrivals[taken].time <= self.now:
                self._add(arrivals[taken])
                taken += 1
            next_arrival = arrivals[taken].time if taken < len(arrivals) else math.inf
            if not self.scheduler.has_requests and not self.jobs:
                if next_arrival == seconds == math.inf:
                    break
                idle = [self.now, min(next_arrival, seconds)]
                samples += [Sample(moment, 0, 0, 0.0, 0.0) for moment in idle]
                self.now = idle[1]
                continue
            plan = self.step(next_arrival)
            steps += 1
            if plan.empty:  # somebody's adapter is on its way
                read = self.tiers.next_read()
                self.now = max(self.now + 1e-4, next_arrival if read is None else min(read, next_arrival))
                continue
            self.now += self.tiers.take_stall()
            if plan.inference:
                self._account(plan)
            self._renew_jobs()
            if self.now >= due:
                elapsed, trained = self.now - mark[0], self.training_seconds - mark[1]
                running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
                step = self.now - self.began if plan.inference else 0.0
                share = trained / elapsed if elapsed else 0.0
                samples.append(Sample(self.now, running, waiting, step, share))
                due, mark = self.now + sample_every, (self.now, self.training_seconds)
        return Outcome(
            seconds=self.now,
            served=self._done,
            pending=list(self._served.values()),
            trained_tokens=self._trained,
            steps=steps,
            training_seconds=self.training_seconds,
            samples=samples,
            errors=self._errors,
            waits=self._waits,
            preemptions=self.scheduler.num_preemptions,
            evictions=self.scheduler.training.num_evictions,
            before=before,
        )

    def _account(self, plan: StepPlan) -> None:
        """The last step's tokens to their requests, its length to the model's errors."""
        if plan.inference_alone and (plan.apart or not plan.training_forward):
            self._errors.append(abs((self.answered - self.began) / plan.inference_alone - 1.0))
        answered, all_served = self.answered, self._served
        for request in self.sampled:
            served = all_served[request.sequence_id]
            if served.first is None:
                served.first = answered
            else:
                served.gaps.append(answered - served.last)
            served.last = answered
            served.tokens += 1
            if request.finished:
                self._done.append(self._served.pop(request.sequence_id))

    def _renew_jobs(self) -> None:
        for job in self.jobs.values():
            sequences = self._open[job.name]
            if sequences[-1].done and all(s.done for s in sequences):
                self._trained[job.name] += sum(s.num_tokens for s in sequences)
                self._begin(job)


class Saturation(NamedTuple):
    """Requests and generated tokens a second, and TPOT p50 in seconds."""

    requests: float
    tokens: float
    tpot: float


def saturation(simulator: Simulator, arrivals: Sequence[Arrival]) -> Saturation:
    """What the server completes while more of them wait: all arrive at once, and as many as run together are
    left out at both ends where there are enough."""
    flood = [Arrival(0.0, a.prompt_tokens, a.output_tokens, a.client, a.prefix) for a in arrivals]
    outcome = simulator.run(flood, math.inf, sample_every=0.0)
    done = sorted(outcome.served, key=lambda served: served.last)
    edge = max(sample.running for sample in outcome.samples)
    begin, seconds = 0.0, outcome.seconds
    if len(done) >= 3 * edge:
        begin, seconds = done[edge - 1].last, done[-edge - 1].last
        done = done[edge:-edge]
    tokens, took = sum(served.tokens for served in done), seconds - begin
    tpots = [served.tpot for served in done if served.tpot is not None]
    return Saturation(len(done) / took, tokens / took, quantile(tpots, 0.5) or 0.0)
