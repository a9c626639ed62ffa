"""Prometheus metrics: vLLM's core set under vLLM's names and labels, and `coserve_*` for the rest.

Gauges are filled from the engine's `EngineStats`; counters and histograms of requests by the application
layer. No label has unbounded values.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from coserve.class_metrics import DEFAULT_CLASS, ClassMetrics
from coserve.core.slo import LatencyTargets
from coserve.engine.messages import EngineStats, StepTiming

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ENGINE = "0"

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ERROR = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0)
_PUBLISH = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
MEMORY_OWNERS = ("weights", "kv", "adapters", "activations", "optimizer", "workspace", "runtime", "free")
ACTIVATION_POLICIES = ("A", "B", "C")
ADAPTER_TIERS = ("device", "host", "disk")
STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to the context's length, as vLLM has them."""
    buckets = [m * 10**e for e in range(12) for m in (1, 2, 5) if m * 10**e <= max_model_len]
    return tuple(buckets)


@dataclass
class RequestTimes:
    """Moments of a request, in seconds of one clock (time.time); None: not reached."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class _LoraInfo(Collector):
    """vLLM's lora_requests_info: one live label set whose value is the time of the update."""

    def __init__(self, model_name: str, max_loras: int) -> None:
        self._max_loras = str(max_loras)
        self.running: tuple[str, ...] = ()
        self.waiting: tuple[str, ...] = ()
        self.updated = time.time()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on LoRA requests.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        labels = (self._max_loras, ",".join(self.running), ",".join(self.waiting))
        family.add_metric(labels, self.updated)
        return [family]


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        max_loras: int,
        cache_config: Mapping[str, object] | None = None,
        targets: Mapping[str, LatencyTargets] | None = None,
    ) -> None:
        """`targets` are those of the latency classes, by name."""
        self.registry = CollectorRegistry()
        self._classes = ClassMetrics(self.registry, targets or {DEFAULT_CLASS: LatencyTargets()})
        self._labels = {"model_name": model_name, "engine": _ENGINE}
        self._tokens = token_buckets(max_model_len)
        self._lora = _LoraInfo(model_name, max_loras)
        self.registry.register(self._lora)
        self._make_engine_gauges(cache_config or {})
        self._make_request_metrics()
        self._make_finetuning()
        self._make_own()

    # ------------------------------------------------------------------ making

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, ("model_name", "engine"), registry=self.registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, ("model_name", "engine"), registry=self.registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, ("model_name", "engine"), buckets=buckets, registry=self.registry
        )
        return histogram.labels(**self._labels)

    def _make_engine_gauges(self, cache_config: Mapping[str, object]) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting to be processed.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage, 1 = full.")
        by_reason = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Waiting requests by reason.",
            ("model_name", "engine", "reason"),
            registry=self.registry,
        )
        self._waiting_for = {r: by_reason.labels(**self._labels, reason=r) for r in ("capacity", "deferred")}
        self._preemptions = self._counter("num_preemptions", "Preemptions by the engine.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prefix-cache queries, in tokens.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prefix-cache hits, in tokens.")
        self._iteration = self._histogram("iteration_tokens_total", "Tokens of a step.", _ITERATION)
        labels = {**{key: str(value) for key, value in cache_config.items()}, "engine": _ENGINE}
        info = Gauge(
            "vllm:cache_config_info", "Settings of the KV cache.", tuple(labels), registry=self.registry
        )
        info.labels(**labels).set(1)

    def _make_request_metrics(self) -> None:
        success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            ("model_name", "engine", "finished_reason"),
            registry=self.registry,
        )
        self._success = {r: success.labels(**self._labels, finished_reason=r) for r in FINISH_REASONS}
        self._prompt_total = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._cached_total = self._counter("prompt_tokens_cached", "Prompt tokens found in the cache.")
        self._generated_total = self._counter("generation_tokens", "Tokens generated.")
        tokens = self._tokens
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._generated = self._histogram("request_generation_tokens", "Tokens made for a request.", tokens)
        self._max_generated = self._histogram(
            "request_max_num_generation_tokens", "Largest number of tokens of a request's samples.", tokens
        )
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", tokens)
        self._prefilled = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens computed, not cached.", tokens
        )
        self._n = self._histogram("request_params_n", "n of a request.", _N)
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "Preemptions of a request.", _PREEMPTIONS
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to the first token.", _TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between tokens.", _ITL)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time for a token after its first.",
            _ITL,
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _LATENCY)
        self._inference = self._histogram("request_inference_time_seconds", "First step to end.", _LATENCY)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "First step to first token.", _LATENCY
        )
        self._decode = self._histogram("request_decode_time_seconds", "First token to end.", _LATENCY)

    def _make_finetuning(self) -> None:
        registry = self.registry
        tokens = Counter(
            "coserve_finetune_tokens", "Fine-tuning tokens by kind of work.", ("kind",), registry=registry
        )
        self._finetune_tokens = {kind: tokens.labels(kind) for kind in ("forward", "backward", "trained")}
        self._shared_tokens = Counter(
            "coserve_finetune_shared_tokens",
            "Tokens of training examples computed with those of another that begins alike.",
            registry=registry,
        )
        self._steps = Counter("coserve_finetune_steps", "Optimizer steps committed.", registry=registry)
        jobs = Gauge("coserve_finetune_jobs", "Jobs by status.", ("status",), registry=registry)
        self._jobs = {status: jobs.labels(status) for status in STATUSES}
        layers = Gauge(
            "coserve_finetune_layers",
            "Layers of microbatches in memory by activation policy.",
            ("policy",),
            registry=registry,
        )
        self._layers = {policy: layers.labels(policy) for policy in ACTIVATION_POLICIES}
        reclaims = Counter(
            "coserve_finetune_reclaims",
            "Times that requests took activation memory from a microbatch: a part or all of it.",
            ("kind",),
            registry=registry,
        )
        self._reclaims = {kind: reclaims.labels(kind) for kind in ("downgrade", "eviction")}
        self._share = Gauge(
            "coserve_finetune_share", "Fine-tuning's share of the step's time, 0-1.", registry=registry
        )

    def _make_own(self) -> None:
        registry = self.registry
        self._step_seconds = Histogram(
            "coserve_step_seconds", "Duration of a step.", ("kind",), buckets=_STEP, registry=registry
        )
        self._arrival_wait = Histogram(
            "coserve_arrival_wait_seconds",
            "From a request's arrival until the engine takes it in, by the kind of step it waited for.",
            ("step",),
            buckets=_STEP,
            registry=registry,
        )
        self._budget = Gauge(
            "coserve_step_budget_seconds", "Time the last step was given.", registry=registry
        )
        self._prediction = Histogram(
            "coserve_step_prediction_error_ratio",
            "|predicted - measured| / measured time of the step's batch with requests.",
            buckets=_ERROR,
            registry=registry,
        )
        memory = Gauge("coserve_memory_bytes", "Memory by owner.", ("owner",), registry=registry)
        self._memory = {owner: memory.labels(owner) for owner in MEMORY_OWNERS}
        engine = Gauge(
            "coserve_engine_memory_bytes",
            "Memory of the engine's process, and of its pool's that it hasn't written yet.",
            ("kind",),
            registry=registry,
        )
        self._engine_memory = {kind: engine.labels(kind) for kind in ("resident", "untouched")}
        adapters = Gauge(
            "coserve_adapters", "Adapters by the tier that holds them.", ("tier",), registry=registry
        )
        self._adapters = {tier: adapters.labels(tier) for tier in ADAPTER_TIERS}
        self._swaps = Counter("coserve_adapter_swaps", "Movements of adapters.", ("kind",), registry=registry)
        self.publish_seconds = Histogram(
            "coserve_adapter_publish_seconds",
            "Time to publish a version.",
            buckets=_PUBLISH,
            registry=registry,
        )
        self._rejected = Counter(
            "coserve_requests_rejected", "Requests refused, by reason.", ("reason",), registry=registry
        )

    # ------------------------------------------------------------------ requests

    def request_admitted(self, prompt_tokens: int, max_tokens: int, n: int) -> None:
        """Count a request of `n` samples with one prompt."""
        self._prompt_total.inc(prompt_tokens)
        self._prompt.observe(prompt_tokens)
        self._max_tokens.observe(max_tokens)
        self._n.observe(n)

    def first_token(self, seconds: float, latency_class: str) -> None:
        """Time from a sample's arrival to its first token, and its class."""
        self._ttft.observe(seconds)
        self._classes.first_token(latency_class, seconds)

    def tokens(self, count: int, gap: float | None) -> None:
        """`count` tokens arrived, `gap` seconds after those before (None: the first)."""
        self._generated_total.inc(count)
        if gap is not None:
            for _ in range(count):
                self._itl.observe(gap / count)

    def request_ended(
        self,
        reason: str,
        times: RequestTimes,
        latency_class: str,
        prompt: int,
        generated: int,
        cached: int,
        preemptions: int,
    ) -> None:
        """One sample ended: its reason once, its sizes, its times, and its class."""
        self._success[reason if reason in self._success else "error"].inc()
        self._generated.observe(generated)
        self._max_generated.observe(generated)
        self._cached_total.inc(cached)
        self._prefilled.observe(prompt - cached)
        self._request_preemptions.observe(preemptions)
        end = times.last_token or time.time()
        self._e2e.observe(max(0.0, end - times.arrival))
        if times.scheduled is not None:
            self._queue.observe(max(0.0, times.scheduled - times.arrival))
            self._inference.observe(max(0.0, end - times.scheduled))
            if times.first_token is not None:
                self._prefill.observe(max(0.0, times.first_token - times.scheduled))
        per_token: float | None = None
        if times.first_token is not None:
            decode = max(0.0, end - times.first_token)
            self._decode.observe(decode)
            if generated > 1:
                per_token = decode / (generated - 1)
                self._tpot.observe(per_token)
        waited = max(0.0, (times.first_token or time.time()) - times.arrival)
        self._classes.ended(latency_class, reason, waited, times.first_token is not None, per_token)

    def refused(self, latency_class: str) -> None:
        """The engine refused a sample for its target, or for the queue's length."""
        self._classes.refused(latency_class)

    def rejected(self, reason: str) -> None:
        """Count a refused request; `reason` is a code of the error tree."""
        self._rejected.labels(reason).inc()

    # ------------------------------------------------------------------ engine and jobs

    def engine_stats(self, stats: EngineStats) -> None:
        """Take a snapshot of the engine."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._waiting_for["deferred"].set(stats.waiting_deferred)
        self._waiting_for["capacity"].set(max(0, stats.waiting - stats.waiting_deferred))
        self._kv_usage.set(stats.kv_usage)
        self._preemptions.inc(stats.preemptions)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        self._finetune_tokens["forward"].inc(stats.finetune_forward_tokens)
        self._finetune_tokens["backward"].inc(stats.finetune_backward_tokens)
        self._share.set(stats.finetune_share)
        for policy, gauge in self._layers.items():
            gauge.set(sum(layers.get(policy, 0) for layers in stats.activation_policies.values()))
        self._reclaims["downgrade"].inc(stats.downgrades)
        self._reclaims["eviction"].inc(stats.evictions)
        for owner, gauge in self._memory.items():
            gauge.set(stats.memory_bytes.get(owner, 0))
        self._engine_memory["resident"].set(stats.resident_bytes)
        self._engine_memory["untouched"].set(stats.untouched_bytes)
        for kind, count in stats.swaps.items():
            self._swaps.labels(kind).inc(count)
        for step in stats.steps:
            self._step(step)
        for kind, seconds in stats.arrival_waits:
            self._arrival_wait.labels(kind).observe(seconds)
        self._lora.running = tuple(sorted(set(stats.running_adapters)))
        self._lora.waiting = tuple(sorted(set(stats.waiting_adapters)))
        self._lora.updated = time.time()

    def _step(self, step: StepTiming) -> None:
        self._step_seconds.labels(step.kind).observe(step.seconds)
        self._budget.set(step.budget)
        self._iteration.observe(step.inference_tokens)
        if step.predicted > 0.0 and step.forward > 0.0:
            self._prediction.observe(abs(step.predicted - step.forward) / step.forward)

    def engine_lost(self) -> None:
        """Nothing runs while the engine is away."""
        for gauge in (self._running, self._waiting, self._kv_usage, self._share, *self._waiting_for.values()):
            gauge.set(0)
        self._lora.running = self._lora.waiting = ()

    def adapters(self, tiers: Mapping[str, int]) -> None:
        """Number of registered adapter versions in each tier."""
        for tier, gauge in self._adapters.items():
            gauge.set(tiers.get(tier, 0))

    def jobs(self, by_status: Mapping[str, int]) -> None:
        """Number of jobs in each status."""
        for status, gauge in self._jobs.items():
            gauge.set(by_status.get(status, 0))

    def finetune_step(self, trained_tokens: int, shared_tokens: int) -> None:
        """One optimizer step was committed (counted once)."""
        self._steps.inc()
        self._finetune_tokens["trained"].inc(trained_tokens)
        self._shared_tokens.inc(shared_tokens)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)
