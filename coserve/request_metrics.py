"""What requests cost and how long they take: vLLM's counters and histograms, under its names and labels.

A sample (one of a request's `n`) counts where vLLM counts a request of its engine; `n` and the longest sample
count once for all samples of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from coserve.class_metrics import DEFAULT_CLASS, ClassMetrics
from coserve.core.slo import LatencyTargets
from coserve.token_metrics import TokenMetrics

ENGINE = "0"
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
PROMPT_SOURCES = ("local_compute", "local_cache_hit")

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
_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


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


class RequestMetrics:
    """Metrics of requests, in `registry`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        max_model_len: int,
        targets: Mapping[str, LatencyTargets] | None,
    ) -> None:
        self.registry = registry
        self._classes = ClassMetrics(registry, targets or {DEFAULT_CLASS: LatencyTargets()})
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self._tokens = token_buckets(max_model_len)
        self._make_counters()
        self._make_sizes()
        self._make_times()

    # ------------------------------------------------------------------ making

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, ("model_name", "engine"), registry=self.registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, ("model_name", "engine"), registry=self.registry)
        return counter.labels(**self._labels)

    def _counters(self, name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
        """One counter for each value of a further label."""
        counter = Counter(f"vllm:{name}", text, ("model_name", "engine", label), registry=self.registry)
        return {value: counter.labels(**self._labels, **{label: value}) for value in values}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, ("model_name", "engine"), buckets=buckets, registry=self.registry
        )
        return histogram.labels(**self._labels)

    def _make_counters(self) -> None:
        self._success = self._counters(
            "request_success", "Requests that ended, by reason.", "finished_reason", FINISH_REASONS
        )
        self._prompt_total = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._cached_total = self._counter("prompt_tokens_cached", "Prompt tokens found in the cache.")
        self._by_source = self._counters(
            "prompt_tokens_by_source", "Prompt tokens by where they came from.", "source", PROMPT_SOURCES
        )
        self._cached_by_source = self._counters(
            "prompt_tokens_cached_by_source",
            "Prompt tokens found in the cache, by where it lies.",
            "source",
            ("device",),
        )
        self._token_metrics = TokenMetrics(self._labels, _ITL)
        self.registry.register(self._token_metrics)

    def _make_sizes(self) -> None:
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

    def _make_times(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to the first token.", _TTFT)
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

    # ------------------------------------------------------------------ a request's life

    def sample_started(self, prompt_tokens: int, cached_tokens: int, max_tokens: int) -> None:
        """A sample's prompt has been read: `cached_tokens` of it were known."""
        self._prompt_total.inc(prompt_tokens)
        self._by_source["local_compute"].inc(prompt_tokens - cached_tokens)
        self._by_source["local_cache_hit"].inc(cached_tokens)
        self._cached_by_source["device"].inc(cached_tokens)
        self._cached_total.inc(cached_tokens)
        self._prompt.observe(prompt_tokens)
        self._max_tokens.observe(max_tokens)

    def samples_ended(self, n: int, longest: int) -> None:
        """The `n` samples of a prompt have all ended, the longest with so many tokens."""
        self._n.observe(n)
        self._max_generated.observe(longest)

    def first_token(self, seconds: float, latency_class: str) -> None:
        """Time from a sample's arrival to its first token, and its class."""
        self._ttft.observe(seconds)
        self._classes.first_token(latency_class, seconds)

    def tokens(self, count: int, gap: float | None) -> None:
        """`count` tokens arrived, `gap` seconds after those before (None: the first)."""
        self._token_metrics.take(count, gap)

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
