"""Prometheus metrics: vLLM's core set under vLLM's names and labels, and `coserve_*` for the rest.

Gauges are filled from the engine's `EngineStats`; counters and histograms of requests by the application
layer. No label has unbounded values.
"""

from __future__ import annotations

import shutil
from collections import Counter as Counts
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from coserve import __version__
from coserve.adapter_metrics import AdapterMetrics, LoadedAdapter
from coserve.core.slo import LatencyTargets
from coserve.engine.messages import EngineReady, EngineStats, StepTiming
from coserve.errors import QueueFull
from coserve.request_metrics import ENGINE, RequestMetrics
from coserve.rpc_metrics import RpcMetrics

disable_created_metrics()  # a second series for each counter, which the text format has no use for
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ERROR = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0)
_PUBLISH = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MEMORY_OWNERS = ("weights", "kv", "adapters", "activations", "optimizer", "workspace", "runtime", "free")
ACTIVATION_POLICIES = ("A", "B", "C")
ADAPTER_TIERS = ("device", "host", "disk")
REFUSALS = (  # those that an operator wants to see begin; the others come with their first
    *("queue_full", "ttft_target_out_of_reach", "engine_starting", "shutting_down", "internal_error"),
    *("concurrent_requests_exceeded", "tokens_per_minute_exceeded", "max_jobs_exceeded", "invalid_api_key"),
)
STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")


def _begin(metric: Counter | Histogram, values: Iterable[str]) -> None:
    """Series from 0 on: the first event of one that isn't there yet is no increase to Prometheus."""
    for value in values:
        metric.labels(value)


class Metrics(RequestMetrics):
    """All metrics of one server, in a registry of their own: those of requests, and the rest."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        max_loras: int,
        cache_config: Mapping[str, object] | None = None,
        targets: Mapping[str, LatencyTargets] | None = None,
    ) -> None:
        """`targets` are those of the latency classes, by name."""
        super().__init__(CollectorRegistry(), model_name, max_model_len, targets)
        self.rpc = RpcMetrics(self.registry)
        self._of_adapters = AdapterMetrics(max_loras)
        self.registry.register(self._of_adapters)
        self._make_processes()
        self._make_engine_gauges(cache_config or {})
        self._make_finetuning()
        self._make_own()

    # ------------------------------------------------------------------ making

    def _make_processes(self) -> None:
        """The server's process under the usual names, the engine's beside it."""
        registry = self.registry
        self._engine_pid = 0  # none: its process's metrics are left out
        ProcessCollector(registry=registry)
        ProcessCollector("coserve_engine", pid=lambda: self._engine_pid, registry=registry)
        GCCollector(registry=registry)
        self._up = Gauge("coserve_engine_up", "1 while an engine takes requests.", registry=registry)
        self._restarts = Counter(
            "coserve_engine_restarts", "Engines started in place of one that died.", registry=registry
        )
        self._disk = {
            kind: Gauge(f"coserve_disk_{kind}_bytes", text, registry=registry)
            for kind, text in (
                ("free", "What may still be written where the state directory is."),
                ("size", "Size of the file system where the state directory is."),
            )
        }
        self._build = Gauge(
            "coserve_build_info",
            "1; what runs here.",
            ("version", "model_name", "device", "dtype"),
            registry=registry,
        )
        self._limit = Gauge(
            "coserve_memory_limit_bytes",
            "What the machine, its cgroup or the device allows to be used.",
            registry=registry,
        )

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
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused since the queue was full, by the limit that said so.",
            ("model_name", "reason"),
            registry=self.registry,
        ).labels(self._labels["model_name"], "max_num_queued_reqs")
        self._waiting_for = {r: by_reason.labels(**self._labels, reason=r) for r in ("capacity", "deferred")}
        self._preemptions = self._counter("num_preemptions", "Preemptions by the engine.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prefix-cache queries, in tokens.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prefix-cache hits, in tokens.")
        self._iteration = self._histogram("iteration_tokens_total", "Tokens of a step.", _ITERATION)
        labels = {**{key: str(value) for key, value in cache_config.items()}, "engine": ENGINE}
        info = Gauge(
            "vllm:cache_config_info", "Settings of the KV cache.", tuple(labels), registry=self.registry
        )
        info.labels(**labels).set(1)

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
        _begin(self._step_seconds, ("inference", "training", "mixed"))
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
        _begin(self._swaps, ("load", "evict", "unload", "publish"))
        found = Counter(
            "coserve_adapter_found",
            "Requests by the tier that their adapter was in when they came.",
            ("tier",),
            registry=registry,
        )
        self._found_in = {tier: found.labels(tier) for tier in ADAPTER_TIERS}
        self._adapter_seconds = Counter(
            "coserve_adapter_engine_seconds",
            "Time of the engine's loop that moving adapters took.",
            registry=registry,
        )
        self.publish_seconds = Histogram(
            "coserve_adapter_publish_seconds",
            "Time to publish a version.",
            buckets=_PUBLISH,
            registry=registry,
        )
        self._rejected = Counter(
            "coserve_requests_rejected", "Requests refused, by reason.", ("reason",), registry=registry
        )
        _begin(self._rejected, REFUSALS)

    def rejected(self, reason: str) -> None:
        """Count a refused request; `reason` is a code of the error tree."""
        self._rejected.labels(reason).inc()
        if reason == QueueFull.default_code:
            self._rejections.inc()

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
        for tier, count in stats.adapters_found_in.items():
            self._found_in[tier].inc(count)
        self._adapter_seconds.inc(stats.adapter_seconds)
        for step in stats.steps:
            self._step(step)
        for kind, seconds in stats.arrival_waits:
            self._arrival_wait.labels(kind).observe(seconds)
        self._of_adapters.requests(stats.running_adapters, stats.waiting_adapters)

    def _step(self, step: StepTiming) -> None:
        self._step_seconds.labels(step.kind).observe(step.seconds)
        self._budget.set(step.budget)
        self._iteration.observe(step.inference_tokens)
        if step.predicted > 0.0 and step.forward > 0.0:
            self._prediction.observe(abs(step.predicted - step.forward) / step.forward)

    def watch_disk(self, folder: Path) -> None:
        """Tell of the file system of this folder, as it is at each scrape."""
        self._disk["free"].set_function(lambda: shutil.disk_usage(folder).free)
        self._disk["size"].set_function(lambda: shutil.disk_usage(folder).total)

    def engine_started(self, engine: EngineReady, restarted: bool = False) -> None:
        """An engine takes requests, for the first time or in place of one that died."""
        self._engine_pid = engine.pid
        self._up.set(1)
        self._restarts.inc(int(restarted))
        self._limit.set(engine.memory_limit_bytes)
        self._build.labels(__version__, engine.model_name, engine.device, engine.dtype).set(1)

    def engine_lost(self) -> None:
        """Nothing runs while the engine is away."""
        self._engine_pid = 0
        self._up.set(0)
        for gauge in (
            *(self._running, self._waiting, self._kv_usage, self._share, *self._waiting_for.values()),
            *(*self._memory.values(), *self._engine_memory.values(), *self._layers.values()),
        ):
            gauge.set(0)
        self._of_adapters.requests({}, {})

    def adapters(self, registered: int, loaded: Sequence[LoadedAdapter]) -> None:
        """How many versions are registered, and those that are loaded."""
        found = Counts(adapter.tier for adapter in loaded)
        found["disk"] = registered - len(loaded)
        for tier, gauge in self._adapters.items():
            gauge.set(found[tier])
        self._of_adapters.loaded(loaded)

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
