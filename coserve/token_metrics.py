"""The two metrics that change with every token, kept as plain numbers until they are asked for.

The library's own counters and histograms take locks and several calls for each value, a part of what a
streamed token costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenMetrics(Collector):
    """vLLM's `generation_tokens` and `inter_token_latency_seconds`, with these labels and bucket bounds."""

    def __init__(self, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        self._labels = labels
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)  # by bucket, the last one without a bound
        self._seconds = 0.0
        self._tokens = 0

    def take(self, count: int, gap: float | None) -> None:
        """`count` tokens arrived, `gap` seconds after those before (None: the first)."""
        self._tokens += count
        if gap is not None:
            self._counts[bisect_left(self._bounds, gap / count)] += count
            self._seconds += gap

    def collect(self) -> Iterable[Metric]:
        """Both as they are now."""
        names, values = tuple(self._labels), tuple(self._labels.values())
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=names)
        tokens.add_metric(values, self._tokens)
        gaps = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Time between tokens.", labels=names)
        so_far, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            so_far += count
            buckets.append((floatToGoString(bound), float(so_far)))
        gaps.add_metric(values, buckets, self._seconds)
        return [tokens, gaps]
