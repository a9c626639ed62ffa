"""The scheduler under a simulated clock: coserve/core as it is, on a device made of arithmetic.

A `Device` is a roofline (arithmetic, memory bandwidth, a fixed cost per step, noise); `Shape` says what a
token costs. `Simulator.run` is `Engine.step`'s order: schedule, forward, answer, backward units until the
deadline.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from traces import MOONCAKE_BLOCK, Arrival

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
from coserve.models.config import ModelConfig
from coserve.training.activations import MicrobatchActivations
from coserve.training.backward import window_bounds
from coserve.training.objectives import CHUNK
from coserve.worker.kv_tensors import slab_bytes

BLOCK_SIZE = 16
BYTES = 2  # of a weight and of a cached element: bf16


@dataclass(frozen=True)
class Device:
    """`flops` and `bandwidth` are what products and weight streams reach, not data sheets; `overhead` is
    seconds a step outside of them. `overlaps`: backward units run on a stream of their own beside a
    forward that is bound by memory. A step's time varies by a lognormal factor of deviation `noise`."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    overhead: float
    overlaps: bool = False
    noise: float = 0.03

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline."""
        return max(flops / self.flops, moved / self.bandwidth)


# Two cores of an AMD EPYC with AVX-512 BF16 (docs/kernels.md), and an H200 (NVIDIA's data sheet: 989 TFLOP/s,
# 4.8 TB/s) at four fifths of its bandwidth and at 0.7 of its arithmetic.
DEVICES = {
    "cpu": Device("cpu", 0.42e12, 28e9, 20e9, 2e-3),
    "h200": Device("h200", 690e12, 3.9e12, 141e9, 6e-4, overlaps=True),
}


def _shape(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        "llama", vocab, hidden, inner, layers, heads, kv_heads, hidden // heads, tie_word_embeddings=tied
    )


# Published shapes: Qwen2.5-0.5B, Llama 3.2 1B, Llama 3.1 8B and 70B.
SHAPES = {
    "0.5b": _shape(151936, 896, 4864, 24, 14, 2, True),
    "1b": _shape(128256, 2048, 8192, 16, 32, 8, True),
    "8b": _shape(128256, 4096, 14336, 32, 32, 8, False),
    "70b": _shape(128256, 8192, 28672, 80, 64, 8, False),
}


class CostModel:
    """Seconds of a forward and of each training unit of one model on one device."""

    def __init__(self, device: Device, config: ModelConfig) -> None:
        self.device, self.config = device, config
        hidden = config.hidden_size
        attention = hidden * (config.num_heads * 2 + config.num_kv_heads * 2) * config.head_dim
        self.layer_weights = attention + 3 * hidden * config.intermediate_size
        self.head_weights = config.vocab_size * hidden
        self.weights = self.layer_weights * config.num_layers + self.head_weights
        self.weight_bytes = (self.weights + (0 if config.tie_word_embeddings else self.head_weights)) * BYTES
        self.key_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES
        self._pair_flops = 4.0 * config.num_heads * config.head_dim

    def forward(self, rows: int, sampled: int, context: int, pairs: float) -> float:
        """`rows` tokens through all layers, logits for `sampled` of them; `context` keys are read, `pairs` of
        query and key are computed."""
        layers = self.config.num_layers
        flops = 2.0 * (self.layer_weights * layers * rows + self.head_weights * sampled)
        flops += self._pair_flops * layers * pairs
        moved = self.layer_weights * layers * BYTES + (self.head_weights * BYTES if sampled else 0)
        return self.device.seconds(flops, moved + context * self.key_bytes)

    def unit(self, kind: str, tokens: int, context: int) -> float:
        """A training unit by the latency model's name for it; `context` keys lie behind a layer's window."""
        if kind in ("loss", "score"):
            passes = 2 if kind == "loss" else 1
            return self.device.seconds(
                2.0 * passes * self.head_weights * tokens, self.head_weights * BYTES * passes
            )
        again = {"layer_a": 0.0, "layer_b": 0.5, "layer_c": 1.0}[kind]
        flops = 2.0 * self.layer_weights * tokens * (1.0 + again)
        flops += 2.5 * self._pair_flops * tokens * (context + tokens / 2)
        return self.device.seconds(flops, self.layer_weights * BYTES * (1.0 + again))


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


@dataclass
class Outcome:
    """What a run gave."""

    seconds: float
    served: list[Served]
    unfinished: int
    trained_tokens: dict[str, int]
    steps: int
    training_seconds: float
    samples: list[Sample]
    errors: list[float]  # of the latency model on steps of inference alone, |measured / predicted - 1|
    waits: list[float]  # from an arrival to the step that could take it in
    preemptions: int
    evictions: int

    def quantile(self, values: Sequence[float], q: float) -> float:
        """Of a list that need not be ordered; 0 of none."""
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0

    @property
    def gaps(self) -> list[float]:
        """All inter-token latencies."""
        return [gap for served in self.served for gap in served.gaps]

    @property
    def ttfts(self) -> list[float]:
        """All times to the first token."""
        return [served.ttft for served in self.served]

    def goodput(self, tpot: float, ttft: float) -> float:
        """The part of the requests whose mean gap and first token kept their targets."""
        good = [s for s in self.served if (s.tpot or 0.0) <= tpot and s.ttft <= ttft]
        return len(good) / max(1, len(self.served))


class Simulator:
    """One server in simulated time. `adapters` requests' adapters are drawn by Zipf's law (0: base only); one
    that isn't on the device arrives `load_seconds` after it was first asked for."""

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
        load_seconds: float = 0.05,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        seed: int = 0,
    ) -> None:
        self.costs, self.config = CostModel(device, config), config
        self.device = device
        free = device.memory * 0.9 - self.costs.weight_bytes
        self.num_blocks = int(free // slab_bytes(config, BLOCK_SIZE, torch.bfloat16))
        if self.num_blocks < 64:
            raise ValueError(f"the weights leave no room for a cache on {device.name}")
        self.pool = BlockPool(self.num_blocks, PrefixCache() if prefix_caching else None)
        self.model = LatencyModel()
        self._slots = AdapterSlots(max_loras * rank, max_loras)
        self._rank, self._load_seconds = rank, load_seconds
        self._loading: dict[str, float] = {}
        limits = SchedulerLimits(
            max_num_seqs, max_num_batched_tokens, BLOCK_SIZE, max(4, self.num_blocks // 8)
        )
        self.scheduler = Scheduler(
            limits,
            self.pool,
            self.model,
            targets or LatencyTargets(),
            self._adapter_ready,
            self._slots.release,
        )
        self.jobs = {job.name: job for job in jobs}
        self._adapters = adapters
        self._draw = random.Random(f"simulator/{seed}")
        self.now = 0.0
        self._counter = count()
        self._served: dict[str, Served] = {}
        self._done: list[Served] = []
        self._trained = {job.name: 0 for job in jobs}
        self._training_seconds = 0.0
        self._waits: list[float] = []
        self._errors: list[float] = []
        self._left = 0.0  # seconds that resting windows still owe
        for job in jobs:
            self._begin(job)

    # ------------------------------------------------------------------ what arrives

    def _adapter_ready(self, key: str) -> bool:
        if key in self._slots:
            self._slots.acquire(key)
            return True
        due = self._loading.setdefault(key, self.now + self._load_seconds)
        if self.now >= due and self._slots.allocate(key, self._rank) is not None:
            del self._loading[key]
            self._slots.acquire(key)
            return True
        return False

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

    def _begin(self, job: TrainingJob) -> None:
        config = self.config
        slab = slab_bytes(config, BLOCK_SIZE, torch.bfloat16)
        levels = MicrobatchActivations.level_bytes(config, config.num_layers, job.tokens, torch.bfloat16, 0)
        loss = [TrainingUnit("loss", min(CHUNK, job.tokens - start)) for start in range(0, job.tokens, CHUNK)]
        widths = [end - start for start, end in reversed(window_bounds(job.tokens, 0))]
        layers = [TrainingUnit("layer", w, h) for h in reversed(range(config.num_layers)) for w in widths]
        sequences = [
            TrainingSequence(
                f"{job.name}/{next(self._counter)}",
                job.name,
                index,
                job.tokens,
                (TrainingPass(None, tuple(loss + layers), trains=True),),
                level_slabs=tuple(-(-size // slab) for size in levels),
            )
            for index in range(job.microbatches)
        ]
        self.scheduler.training.submit(job.name, sequences, job.priority)

    # ------------------------------------------------------------------ a step

    def run(self, arrivals: Sequence[Arrival], seconds: float, *, sample_every: float = 1.0) -> Outcome:
        """Serve the arrivals (ordered by time) for so many simulated seconds."""
        times = [a.time for a in arrivals]
        taken, steps, samples = 0, 0, []
        due, mark = 0.0, (0.0, 0.0)
        while self.now < seconds:
            while taken < len(arrivals) and times[taken] <= self.now:
                self._add(arrivals[taken])
                taken += 1
            next_arrival = times[taken] if taken < len(arrivals) else float("inf")
            if not self.scheduler.has_requests and not self.scheduler.training.has_work:
                if next_arrival == seconds == float("inf"):
                    break
                self.now = min(next_arrival, seconds)
                continue
            began = self.now
            plan = self._step(next_arrival)
            steps += 1
            if self.now >= due:
                elapsed, trained = self.now - mark[0], self._training_seconds - mark[1]
                running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
                share = trained / elapsed if elapsed else 0.0
                step = self.now - began if plan.inference else 0.0
                samples.append(Sample(self.now, running, waiting, step, share))
                due, mark = self.now + sample_every, (self.now, self._training_seconds)
        queue = self.scheduler.training
        return Outcome(
            seconds=self.now,
            served=self._done,
            unfinished=len(self._served),
            trained_tokens=self._trained,
            steps=steps,
            training_seconds=self._training_seconds,
            samples=samples,
            errors=self._errors,
            waits=self._waits,
            preemptions=self.scheduler.num_preemptions,
            evictions=queue.num_evictions,
        )

    def _step(self, next_arrival: float) -> StepPlan:
        plan = self.scheduler.schedule(self.now)
        if plan.empty:  # somebody's adapter is on its way
            pending = [*self._loading.values(), next_arrival]
            self.now = max(self.now + 1e-4, min(pending))
            return plan
        started = self.now
        noise = self._draw.lognormvariate(0.0, self.device.noise)
        windows = [] if plan.apart else plan.training_forward
        if plan.inference or windows:
            self.now += self.device.overhead + noise * self._forward(plan, windows)
        self._answer(plan)
        forward = self.now - started
        if plan.inference and not windows:
            predicted = self.model.predict_inference(plan.inference_tokens, plan.context_tokens)
            if predicted:
                self._errors.append(abs(forward / predicted - 1.0))
            self.model.observe_inference(plan.inference_tokens, plan.context_tokens, forward)
        if windows:
            self._pay_forward(plan, max(forward - plan.inference_alone, 1e-6))
        deadline = started + plan.inference_alone + plan.training_budget
        stop = deadline if plan.inference else next_arrival
        if plan.apart:
            self._forward_apart(plan, noise, stop)
        # A stream of its own hides units under a forward that waits for memory.
        hidden = self._idle_arithmetic(plan) if self.device.overlaps and plan.inference else 0.0
        self._backward(plan, noise, min(stop, deadline), hidden)
        for job in self.jobs.values():
            mine = [s for s in self.scheduler.training.sequences if s.job_id == job.name]
            if mine and all(s.done for s in mine):
                self._trained[job.name] += sum(s.num_tokens for s in mine)
                self._begin(job)
        return plan

    def _forward(self, plan: StepPlan, windows: Sequence[object]) -> float:
        trained = sum(span.length for span in plan.training_forward) if windows else 0
        pairs = sum(span.length * (span.start + (span.length + 1) / 2) for span in plan.inference)
        pairs += sum(s.length * (s.start + s.length / 2) for s in plan.training_forward) if windows else 0
        sampled = sum(span.samples for span in plan.inference)
        return self.costs.forward(plan.inference_tokens + trained, sampled, plan.context_tokens, pairs)

    def _idle_arithmetic(self, plan: StepPlan) -> float:
        config, costs = self.config, self.costs
        flops = 2.0 * costs.layer_weights * config.num_layers * plan.inference_tokens / self.device.flops
        return max(0.0, self._forward(plan, ()) - flops)

    def _answer(self, plan: StepPlan) -> None:
        self.scheduler.commit(plan)
        for span in plan.inference:
            request = span.request
            if request.finished or not span.samples:
                continue
            served = self._served[request.sequence_id]
            if served.first is None:
                served.first = self.now
            else:
                served.gaps.append(self.now - served.last)
            served.last = self.now
            served.tokens += 1
            if request.append(7) is not None:
                self.scheduler.finish(request)
                self._done.append(self._served.pop(request.sequence_id))

    def _pay_forward(self, plan: StepPlan, seconds: float, earlier: float = 0.0) -> None:
        rows = sum(span.length for span in plan.training_forward)
        queue = self.scheduler.training
        self.model.observe_unit("forward", rows, seconds + earlier)
        self._training_seconds += seconds
        for span in plan.training_forward:
            span.sequence.cursor += span.length
            queue.release_head(span.sequence)
            queue.charge(span.sequence.job_id, seconds * span.length / rows)

    def _forward_apart(self, plan: StepPlan, noise: float, stop: float) -> None:
        """Layer by layer until `stop`; rests there."""
        rows = sum(span.length for span in plan.training_forward)
        pairs = sum(s.length * (s.start + s.length / 2) for s in plan.training_forward)
        whole = noise * self.costs.forward(rows, 0, 0, pairs)
        queue, layers = self.scheduler.training, self.config.num_layers
        layer = whole / layers
        left = self._left if plan.training_forward == queue.resting else whole
        spent = 0.0
        while left > 1e-12:
            spent += layer
            left -= layer
            if left > 1e-12 and self.now + spent >= stop:
                break
        self.now += spent
        self._left = left
        if left > 1e-12:
            self._training_seconds += spent
            for span in plan.training_forward:
                queue.charge(span.sequence.job_id, spent * span.length / rows)
            queue.rest(plan.training_forward, spent, layer)
        else:
            self._pay_forward(plan, max(spent, 1e-6), queue.awake())

    def _backward(self, plan: StepPlan, noise: float, stop: float, hidden: float) -> None:
        queue = self.scheduler.training
        for span in plan.training_backward:
            for _ in range(span.length):
                sequence = span.sequence
                unit, kind = sequence.units[sequence.unit_cursor], sequence.unit_kind(sequence.unit_cursor)
                context = max(0, sequence.num_tokens - unit.tokens) // 2
                seconds = noise * self.costs.unit(kind, unit.tokens, context)
                concealed = min(hidden, seconds)
                hidden -= concealed
                self.now += seconds - concealed
                self._training_seconds += seconds
                self.model.observe_unit(kind, unit.tokens, max(seconds - concealed, 1e-7))
                queue.charge(sequence.job_id, seconds)
                sequence.pay_unit()
                if sequence.done:
                    queue.release(sequence)
                if self.now >= stop:
                    return


def saturation(simulator: Simulator, arrivals: Sequence[Arrival]) -> float:
    """Requests a second that the server completes when all arrive at once."""
    flood = [Arrival(0.0, a.prompt_tokens, a.output_tokens, a.client, a.prefix) for a in arrivals]
    outcome = simulator.run(flood, float("inf"))
    return len(outcome.served) / outcome.seconds
