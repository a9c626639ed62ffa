"""The exposition is well formed, by the rules of `promtool check metrics`; classes are counted apart."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coserve.core.slo import LatencyTargets
from coserve.metrics import Metrics
from coserve.request_metrics import RequestTimes

TARGETS = {"default": LatencyTargets(), "live": LatencyTargets(ttft=0.2, tpot=0.02)}
NAME = re.compile(r"(vllm:|coserve_|http_|grpc_server_|process_|python_gc_)[a-z0-9_]+")
UNITS = {"milliseconds", "ms", "minutes", "kilobytes", "megabytes", "percent"}


def made() -> Metrics:
    return Metrics("model", 4096, 4, targets=TARGETS)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


def end(
    metrics: Metrics, name: str, reason: str = "stop", first: float | None = 0.1, gap: float = 0.01
) -> None:
    """A request of class `name` with eleven tokens, `gap` seconds apart from the `first` on."""
    times = RequestTimes(arrival=1000.0, scheduled=1000.0)
    if first is not None:
        times.first_token, times.last_token = 1000.0 + first, 1000.0 + first + 10 * gap
        metrics.first_token(first, name)
    metrics.request_ended(reason, times, name, 5, 11 if first is not None else 0, 0, 0)


@pytest.mark.parametrize(
    ("how", "outcome", "missed"),
    [
        ({}, "good", ()),
        ({"first": 0.3}, "missed", ("ttft",)),
        ({"gap": 0.03}, "missed", ("tpot",)),
        ({"first": 0.3, "gap": 0.03}, "missed", ("ttft", "tpot")),
        ({"reason": "abort"}, "aborted", ()),
        ({"reason": "abort", "first": None}, "missed", ("ttft",)),
        ({"reason": "error"}, "failed", ()),
    ],
)
def test_a_request_counts_once_by_outcome_and_once_for_each_target_it_misses(how, outcome, missed) -> None:
    metrics = made()
    end(metrics, "live", **how)
    for word in ("good", "missed", "aborted", "failed", "refused"):
        labels = {"latency_class": "live", "outcome": word}
        assert value(metrics, "coserve_class_requests_total", **labels) == float(word == outcome)
    for kind in ("ttft", "tpot"):
        assert value(metrics, "coserve_slo_missed_total", kind=kind) == float(kind in missed)
        labels = {"latency_class": "live", "kind": kind}
        assert value(metrics, "coserve_class_missed_total", **labels) == float(kind in missed)
        assert value(metrics, "coserve_class_missed_total", latency_class="default", kind=kind) == 0.0


def test_a_class_without_targets_misses_none() -> None:
    metrics = made()
    end(metrics, "default", first=60.0, gap=60.0)
    metrics.refused("live")
    labels = {"latency_class": "default", "outcome": "good"}
    assert value(metrics, "coserve_class_requests_total", **labels) == 1.0
    labels = {"latency_class": "live", "outcome": "refused"}
    assert value(metrics, "coserve_class_requests_total", **labels) == 1.0
    assert value(metrics, "coserve_class_target_seconds", latency_class="live", kind="tpot") == 0.02
    assert value(metrics, "coserve_slo_target_seconds", kind="tpot") == 0.0


def test_the_exposition_is_well_formed() -> None:
    metrics = made()
    end(metrics, "live")
    metrics.rejected("queue_full")
    text = metrics.render().decode()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family.name
        assert NAME.fullmatch(family.name), family.name
        assert not family.name.endswith(("_counter", "_gauge", "_histogram", "_bucket", "_count", "_sum"))
        if family.name.startswith("coserve_"):
            assert not UNITS & set(family.name.split("_")), family.name
            assert (family.type != "gauge") or not family.name.endswith("_total")
        seen = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(seen) == len(set(seen)), family.name
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in sample.labels)
