"""What a server's /metrics says, as numbers."""

from __future__ import annotations

from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def samples(http: httpx.Client) -> list[tuple[str, tuple[tuple[str, str], ...], float]]:
    """(name, labels, value) of every line."""
    text = http.get("/metrics").text
    return [
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def value(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's lines that have these labels."""
    return sum(
        number
        for found, has, number in samples(http)
        if found == name and labels.items() <= dict(has).items()
    )


def ended(http: httpx.Client) -> Counter[str]:
    """Requests that ended, by their reason."""
    found = [s for s in samples(http) if s[0] == "vllm:request_success_total"]
    return Counter({dict(labels)["finished_reason"]: int(number) for _, labels, number in found})


def at_rest(http: httpx.Client) -> bool:
    """Whether the gauges of requests are all 0."""
    return all(value(http, gauge) == 0.0 for gauge in GAUGES)
