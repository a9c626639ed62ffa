"""The scheduler's promises on a simulated device: a 0.5B model on two cores, an 8B model on an H200."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import traces
from simulator import DEVICES, SHAPES, Outcome, Simulator, TrainingJob, saturation

from coserve.core.slo import LatencyTargets


def run(rate: float, tpot: float = 0.0, jobs: int = 1, seconds: float = 40.0) -> tuple[Simulator, Outcome]:
    arrivals = traces.generated(rate, seconds * 0.8, prompt=128, output=48, seed=1)
    work = [TrainingJob(f"job-{index}") for index in range(jobs)]
    targets = LatencyTargets(tpot=tpot)
    simulator = Simulator(DEVICES["cpu"], SHAPES["0.5b"], targets=targets, jobs=work, prefix_caching=False)
    return simulator, simulator.run(arrivals, seconds)


@pytest.mark.parametrize("tpot", [0.065, 0.1, 0.14])
def test_requests_keep_their_target_and_training_takes_what_it_leaves(tpot: float) -> None:
    _, both = run(1.0, tpot)
    assert both.unfinished == 0
    means = [served.tpot for served in both.served if served.tpot is not None]
    assert both.quantile(means, 0.99) <= tpot
    assert sum(both.trained_tokens.values()) > 0
    assert both.training_seconds / both.seconds > 0.2


def test_a_wider_target_trains_more() -> None:
    trained = [run(1.0, tpot)[1].training_seconds for tpot in (0.05, 0.1, 0.2)]
    assert trained[0] < trained[1] < trained[2]


def test_nobody_starves_in_a_burst_of_twenty_times_the_load() -> None:
    calm = traces.generated(0.5, 30.0, prompt=64, output=24, seed=2)
    burst = [
        traces.Arrival(10.0 + a.time / 20, 64, 24) for a in traces.generated(1.0, 20.0, prompt=64, output=24)
    ]
    arrivals = sorted([*calm, *burst], key=lambda a: a.time)
    simulator = Simulator(DEVICES["cpu"], SHAPES["0.5b"], jobs=[TrainingJob()], prefix_caching=False)
    outcome = simulator.run(arrivals, 90.0)
    assert outcome.unfinished == 0 and len(outcome.served) == len(arrivals)
    queue = [sample.running + sample.waiting for sample in outcome.samples if sample.time > 60.0]
    assert max(queue) <= 3


def test_the_device_is_never_idle_while_a_job_has_work() -> None:
    _, outcome = run(0.5, jobs=2)
    _, alone = run(0.5, jobs=0)
    assert outcome.steps > alone.steps
    first, second = outcome.trained_tokens.values()
    assert first == pytest.approx(second, rel=0.35) and first > 0
    _, idle = run(1e-9, jobs=1)
    assert idle.training_seconds == pytest.approx(idle.seconds, rel=0.01)


def test_the_latency_model_is_within_its_noise() -> None:
    for device, shape, rate in (("cpu", "0.5b", 1.5), ("h200", "8b", 10.0)):
        arrivals = traces.generated(rate, 20.0, prompt=400, output=60, seed=3)
        outcome = Simulator(DEVICES[device], SHAPES[shape], prefix_caching=False).run(arrivals, 30.0)
        late = outcome.errors[len(outcome.errors) // 4 :]
        assert outcome.quantile(late, 0.95) < 0.15, device


def test_on_a_device_bound_by_memory_training_costs_little() -> None:
    arrivals = traces.generated(8.0, 12.0, prompt=512, output=150, seed=4)
    outcomes = []
    for jobs in ([], [TrainingJob(microbatches=4)]):
        simulator = Simulator(DEVICES["h200"], SHAPES["8b"], jobs=jobs, prefix_caching=False)
        outcomes.append(simulator.run(arrivals, 15.0))
    serving, both = outcomes
    assert both.quantile(both.gaps, 0.5) < 1.3 * serving.quantile(serving.gaps, 0.5)
    assert both.training_seconds > 0.3 * both.seconds


def test_adapters_by_the_thousand_wait_for_their_rows_and_are_served() -> None:
    arrivals = traces.generated(4.0, 10.0, prompt=64, output=16, seed=5)
    simulator = Simulator(DEVICES["h200"], SHAPES["8b"], adapters=2000, max_loras=8, prefix_caching=False)
    outcome = simulator.run(arrivals, 30.0)
    assert outcome.unfinished == 0
    assert min(outcome.ttfts) < 0.02 and outcome.quantile(outcome.ttfts, 0.9) > 0.05  # warm ones, cold ones


def test_saturation_is_what_a_flood_completes() -> None:
    flood = [traces.Arrival(0.0, 128, 32)] * 40
    simulator = Simulator(DEVICES["cpu"], SHAPES["0.5b"], prefix_caching=False)
    rate = saturation(simulator, flood)
    costs = simulator.costs
    arithmetic = 2.0 * costs.layer_weights * costs.config.num_layers * 160 / DEVICES["cpu"].flops
    assert 0.5 / arithmetic < rate < 1.0 / arithmetic


def test_a_trace_at_a_rate_has_that_many_requests_and_keeps_its_bursts() -> None:
    arrivals = traces.generated(3.0, 100.0, prompt=10, output=5, cv=3.0)
    shaped = traces.at_rate(arrivals, 0.5, 400.0)
    assert len(shaped) == 200 and shaped == sorted(shaped, key=lambda a: a.time)
    assert 350.0 < shaped[-1].time < 400.0
    scale = (shaped[11].time - shaped[10].time) / (arrivals[11].time - arrivals[10].time)
    assert shaped[50].time - shaped[49].time == pytest.approx(scale * (arrivals[50].time - arrivals[49].time))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("TIMESTAMP,Tokens\n", "line 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,12,x\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,12,3\n", "line 2"),
    ],
)
def test_a_trace_in_another_format_is_refused_by_its_line(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(traces.TraceError, match=f"trace.csv {names}"):
        traces.azure(path)


def test_published_traces_are_read_where_they_are() -> None:
    if not traces.SHARED.exists():
        with pytest.raises(traces.TraceError, match="absent"):
            traces.load("azure", 10.0)
        return
    azure, mooncake = traces.load("azure", 10.0), traces.load("mooncake", 10.0)
    assert len(azure) == 8819 and len(mooncake) == 3993
    assert mooncake[0].prompt_tokens == 40160 and len(mooncake[0].prefix) == 79
    clients = traces.servegen(begin=420_000.0, seconds=20.0)
    assert {a.client for a in clients} == {12, 14, 26, 35}
    assert all(a.time <= b.time < 20.0 for a, b in pairwise(clients))
