"""The scheduler's promises on a simulated device: a 0.5B model on two cores, an 8B model on an H200."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import traces
from common import quantile
from simulation.device import DEVICES, SHAPES
from simulation.plots import Column, draw
from simulation.server import Outcome, Simulator, TrainingJob, saturation

from coserve.core.slo import LatencyTargets
from coserve.errors import ConfigError


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
    # Once costs are known: 8 s of it.
    means = [s.tpot for s in both.served if s.tpot is not None and s.arrival.time > 8.0]
    assert quantile(means, 0.99) <= tpot
    assert sum(both.trained_tokens.values()) > 0
    assert both.training_seconds / both.seconds > 0.2


def test_a_wider_target_trains_more() -> None:
    trained = [run(1.0, tpot)[1].training_seconds for tpot in (0.05, 0.1, 0.2)]
    assert 0 < trained[0] < trained[1] < trained[2]


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
        assert quantile(late, 0.95) < 0.15, device


def test_on_a_device_bound_by_memory_training_costs_little() -> None:
    arrivals = traces.generated(8.0, 8.0, prompt=512, output=150, seed=4)
    outcomes = []
    for jobs in ([], [TrainingJob(microbatches=4)]):
        targets = LatencyTargets(tpot=6e-3)
        simulator = Simulator(DEVICES["h200"], SHAPES["8b"], targets=targets, jobs=jobs, prefix_caching=False)
        outcomes.append(simulator.run(arrivals, 10.0))
    serving, both = outcomes
    assert quantile(both.tpots, 0.99) < 6e-3
    assert quantile(both.gaps, 0.5) < 1.3 * quantile(serving.gaps, 0.5)
    assert both.training_seconds > 0.15 * both.seconds


def test_adapters_by_the_thousand_wait_for_their_rows_and_are_served() -> None:
    arrivals = traces.generated(4.0, 10.0, prompt=64, output=16, seed=5)
    simulator = Simulator(DEVICES["h200"], SHAPES["8b"], adapters=2000, max_loras=8, prefix_caching=False)
    outcome = simulator.run(arrivals, 30.0)
    assert outcome.unfinished == 0
    read = simulator.costs.adapter_bytes / DEVICES["h200"].disk
    assert min(outcome.ttfts) < 0.02 and quantile(outcome.ttfts, 0.9) > read  # warm ones, cold ones
    swaps = simulator.tiers.swaps
    assert 8 < swaps["read"] <= swaps["place"], "some came back from host memory"
    assert simulator.pool.num_free == simulator.num_blocks


def test_saturation_is_what_a_flood_completes() -> None:
    flood = [traces.Arrival(0.0, 128, 32)] * 40
    simulator = Simulator(DEVICES["cpu"], SHAPES["0.5b"], prefix_caching=False)
    rate, tokens, tpot = saturation(simulator, flood)
    assert tokens == pytest.approx(32 * rate)
    costs = simulator.costs
    arithmetic = 2.0 * costs.layer_weights * costs.config.num_layers * 160 / DEVICES["cpu"].flops
    assert 0.5 / arithmetic < rate < 1.0 / arithmetic
    assert 10 < tokens * tpot < 44, "about as many as run together, less while they begin and end"


def test_a_trace_at_a_rate_has_that_many_requests_and_keeps_its_bursts() -> None:
    arrivals = traces.generated(3.0, 100.0, prompt=10, output=5, cv=3.0)
    shaped = traces.at_rate(arrivals, 0.5, 400.0)
    assert len(shaped) == 200 and shaped == sorted(shaped, key=lambda a: a.time)
    assert 350.0 < shaped[-1].time < 400.0
    scale = (shaped[11].time - shaped[10].time) / (arrivals[11].time - arrivals[10].time)
    assert shaped[50].time - shaped[49].time == pytest.approx(scale * (arrivals[50].time - arrivals[49].time))


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = '{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "TIMESTAMP,Tokens\n", "a.csv line 1: the header is 'TIMESTAMP,Tokens'; .*ContextTokens"),
        ("a.csv", "", "a.csv line 1: .*expected a CSV with the header TIMESTAMP,ContextTokens"),
        ("a.csv", HEADER + "2023-11-16 18:17:03.97,12,x\n", "a.csv line 2: .*GeneratedTokens"),
        ("a.csv", HEADER + "2023-11-16 18:17:03.97,12,-1\n", "a.csv line 2: '-1' is no count"),
        ("a.csv", HEADER + "2023-11-16 18:17:03.97,12\n", "a.csv line 2"),
        ("a.csv", HEADER + "yesterday,12,3\n", "a.csv line 2: .*yesterday"),
        ("a.csv", HEADER, "a.csv: the trace is empty"),
        ("a.jsonl", ROW + "{}\n", "a.jsonl line 2: 'input_length' is absent; .*hash_ids"),
        ("a.jsonl", ROW + ROW + HEADER, "a.jsonl line 3: .*expected a JSON object"),
        ("a.jsonl", ROW.replace("5", "5.5"), "a.jsonl line 1: 5.5 is no count"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1"),
        ("a.parquet", "PAR1", "there are azure, .*end in .csv .*or .jsonl"),
    ],
)
def test_a_trace_in_another_format_is_refused_by_file_and_line(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(traces.TraceError, match=expected):
        traces.load(str(path), 10.0)


def test_a_trace_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zipped.csv"
    with pytest.raises(traces.TraceError, match=r"zipped\.csv: No such file"):
        traces.load(str(path), 10.0)
    path.write_bytes(HEADER.encode() + b"\x1f\x8b\xff")
    with pytest.raises(traces.TraceError, match=r"zipped\.csv line 2: not UTF-8"):
        traces.load(str(path), 10.0)


def test_a_file_in_a_known_format_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "2024-05-10 00:00:02+00:00,3,4\n2024-05-10 00:00:00+00:00,1,2\n")
    assert [(a.time, a.prompt_tokens) for a in traces.load(str(path), 10.0)] == [(0.0, 1), (2.0, 3)]


def test_published_traces_are_read_where_they_are() -> None:
    if not traces.SHARED.exists():
        with pytest.raises(traces.TraceError, match="No such file"):
            traces.load("azure", 10.0)
        return
    azure, mooncake = traces.load("azure", 10.0), traces.load("mooncake", 10.0)
    assert len(azure) == 8819 and len(mooncake) == 3993
    assert mooncake[0].prompt_tokens == 40160 and len(mooncake[0].prefix) == 79
    clients = traces.servegen(begin=420_000.0, seconds=20.0)
    assert {a.client for a in clients} == {12, 14, 26, 35}
    assert all(a.time <= b.time < 20.0 for a, b in pairwise(clients))


def test_a_model_that_does_not_fit_is_refused_with_its_bytes() -> None:
    with pytest.raises(ConfigError, match=r"141 GB of weights .* 0\.9 of h200's 141 GB"):
        Simulator(DEVICES["h200"], SHAPES["70b"])
    assert Simulator(DEVICES["4xh200"], SHAPES["70b"]).num_blocks > 10_000


def test_adapters_in_a_batch_cost_the_way_of_their_weights() -> None:
    arrivals = [traces.Arrival(0.0, 16, 40)] * 32
    middle = []
    for adapters in (0, 1, 400):
        simulator = Simulator(
            DEVICES["h200"], SHAPES["8b"], adapters=adapters, max_loras=32, prefix_caching=False
        )
        outcome = simulator.run(arrivals, 20.0)
        assert outcome.unfinished == 0
        middle.append(quantile(outcome.gaps, 0.5))
    assert middle[0] < middle[1] < middle[2] < 2 * middle[0]


def test_calls_beside_a_forward_shorten_the_gaps() -> None:
    """In the arithmetic that a decoding step leaves idle on a device bound by memory."""
    arrivals = traces.generated(8.0, 8.0, prompt=64, output=150, seed=4)
    trained, gaps = [], []
    for beside in (0, 1, 64):
        simulator = Simulator(
            replace(DEVICES["h200"], calls_beside=beside),
            SHAPES["8b"],
            targets=LatencyTargets(tpot=6e-3),
            jobs=[TrainingJob()],
            prefix_caching=False,
        )
        outcome = simulator.run(arrivals, 10.0)
        trained.append(sum(outcome.trained_tokens.values()))
        gaps.append(quantile(outcome.gaps, 0.5))
    assert gaps[2] < gaps[0] and trained[2] >= trained[0] > 0
    assert max(gaps) < 6e-3


def test_a_plot_has_a_column_for_each_load(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (_, alone), (_, both) = run(1.0, jobs=0, seconds=8.0), run(1.0, seconds=8.0)
    sizes = []
    for columns in (1, 2):
        path = tmp_path / f"{columns}.png"
        draw(path, [Column(0.5, alone, both, 0.1)] * columns, "two loads")
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(head[16:20]))
    assert sizes[1] > sizes[0] + 200
