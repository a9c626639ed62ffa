"""The two metrics that change with every token say what the library's own would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from coserve.token_metrics import TokenMetrics

BOUNDS = (0.01, 0.1, 1.0)
GAPS = st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.05, 0.1, 1.0, 7.0]))


@given(st.lists(st.tuples(st.integers(1, 4), GAPS), max_size=20))
def test_they_are_exposed_like_a_counter_and_a_histogram(arrivals: list[tuple[int, float | None]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    metrics = TokenMetrics({"model_name": "m"}, BOUNDS)
    ours.register(metrics)
    total = Counter("vllm:generation_tokens", "Tokens generated.", ("model_name",), registry=theirs)
    gaps = Histogram(
        "vllm:inter_token_latency_seconds",
        "Time between tokens.",
        ("model_name",),
        buckets=BOUNDS,
        registry=theirs,
    )
    total.labels("m").inc(0)
    seconds = 0.0
    child = gaps.labels("m")
    for count, gap in arrivals:
        metrics.take(count, gap)
        total.labels("m").inc(count)
        for _ in range(count if gap is not None else 0):
            child.observe((gap or 0.0) / count)
        seconds += gap or 0.0
    said, wanted = (
        [line for line in generate_latest(one).decode().splitlines() if "_created" not in line]
        for one in (ours, theirs)
    )
    assert [line for line in said if "_sum" not in line] == [line for line in wanted if "_sum" not in line]
    (sum_line,) = [line for line in said if "_sum" in line]
    assert abs(float(sum_line.split()[-1]) - seconds) < 1e-9
