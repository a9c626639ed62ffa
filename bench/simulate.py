"""The scheduler on a simulated device: latency, training's share and queue over an arrival trace, at several
loads.

`coserve/core` as it is, on a roofline of two CPU cores (`--device cpu`) or of an H200, for the 0.5B, 1B, 8B
or 70B shape. Saturation is measured first, by the same simulator; then each load runs three ways: requests
alone, training alone, both. `eta` is the part of training alone that is kept beside requests; `u` adds the
part of saturation that is served (of the most that the seats complete, whatever the latency), `u_at_target`
the part of what they complete at the TPOT target; `u_most` is what `u` would be if training took all the
arithmetic that requests leave; `rho` is ITL p99 over that of requests alone; `goodput` the part of the
requests within their target.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import traces
from simulation.device import DEVICES, SHAPES, CostModel
from simulation.plots import Column, draw
from simulation.server import Outcome, Simulator, TrainingJob, saturation

from coserve.core.slo import AUTO_FLOOR, AUTO_RATIO, LatencyTargets
from coserve.errors import ConfigError

LOADS = (0.25, 0.5, 0.75, 0.95)
SATURATING = 1024  # requests of the flood at most


@dataclass(frozen=True)
class Preset:
    """What a device is given to do: the longest prompt and output (tokens) so that a trace fits it, a job's
    microbatches, the seconds of a run."""

    prompt: int
    output: int
    microbatch: int
    seconds: float


PRESETS = {
    "cpu": Preset(512, 128, 512, 600.0),
    "h200": Preset(8192, 1024, 2048, 60.0),
    "4xh200": Preset(8192, 1024, 2048, 60.0),
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file (default: under bench/results)")
    parser.add_argument("--quick", action="store_true", help="one load, a short trace")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    names = "azure, mooncake, servegen, poisson, bursty, or a .csv or .jsonl file"
    parser.add_argument("--trace", default="azure", help=names)
    parser.add_argument("--load", type=float, action="append", help="of saturation; repeatable")
    parser.add_argument("--seconds", type=float, default=0.0, help="simulated time of a run (0: by device)")
    parser.add_argument("--warm", type=float, default=0.0, help="seconds at first that U and eta leave out")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="longest prompt (0: by device)")
    parser.add_argument("--output-tokens", type=int, default=0, help="longest output (0: by device)")
    parser.add_argument("--slo-tpot-ms", type=float, default=0.0, help="0: automatic")
    parser.add_argument("--slo-tpot-ratio", type=float, help="of TPOT p50 of requests alone at the same load")
    parser.add_argument("--slo-ttft-ms", type=float, default=0.0)
    parser.add_argument("--adapters", type=int, default=0, help="adapters that requests draw from (Zipf)")
    parser.add_argument("--max-loras", type=int, default=16, help="of them on the device")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    beside = "what if: backward calls of a step beside its forward (default: one on a GPU, as the engine)"
    parser.add_argument("--calls-beside", type=int, help=beside)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write a PNG of latencies, share and queue")
    parser.add_argument("--seed", type=int, default=0)
    how = parser.parse_args()
    preset = PRESETS[how.device]
    how.seconds = how.seconds or preset.seconds
    if how.quick:
        how.seconds = min(how.seconds, 60.0)
    how.prompt_tokens = how.prompt_tokens or preset.prompt
    how.output_tokens = how.output_tokens or preset.output
    if how.slo_tpot_ms and how.slo_tpot_ratio:
        parser.error("--slo-tpot-ms and --slo-tpot-ratio: give one of the two")
    return how


def simulator(how: argparse.Namespace, jobs: int, tpot: float = 0.0, seats: int = 0) -> Simulator:
    """A fresh server with a TPOT target in seconds, and fewer `seats` than asked for where that is given."""
    device = DEVICES[how.device]
    if how.calls_beside is not None:
        device = replace(device, calls_beside=how.calls_beside)
    tokens = PRESETS[how.device].microbatch
    return Simulator(
        device,
        SHAPES[how.shape],
        targets=LatencyTargets(ttft=how.slo_ttft_ms / 1e3, tpot=tpot),
        jobs=[TrainingJob(f"job-{index}", tokens) for index in range(jobs)],
        adapters=how.adapters,
        max_loras=how.max_loras,
        max_num_seqs=seats or how.max_num_seqs,
        seed=how.seed,
    )


def saturated(how: argparse.Namespace, arrivals: list[traces.Arrival]) -> list[tuple[float, float]]:
    """What floods complete with half the seats, a quarter ...: TPOT p50 and generated tokens a second."""
    found = []
    for seats in (how.max_num_seqs >> halved for halved in range(5)):
        if seats:
            flood = saturation(simulator(how, 0, seats=seats), arrivals[: 4 * seats])
            found.append((flood.tpot, flood.tokens))
    return sorted(found)


def within(points: list[tuple[float, float]], tpot: float) -> float:
    """The most tokens a second at that TPOT, between the points; below them in proportion."""
    below = max((point for point in points if point[0] <= tpot), default=(0.0, 0.0))
    above = min((point for point in points if point[0] > tpot), default=below)
    part = (tpot - below[0]) / (above[0] - below[0]) if above > below else 0.0
    return max(below[1], below[1] + part * (above[1] - below[1]))


def describe(outcome: Outcome) -> dict[str, Any]:
    """The figures of a run; times in milliseconds."""

    def quantiles(values: list[float]) -> list[float]:
        return [round((common.quantile(values, q) or 0.0) * 1e3, 3) for q in (0.5, 0.99)]

    return {
        "served": len(outcome.served),
        "unfinished": outcome.unfinished,
        "requests_per_second": len(outcome.served) / outcome.seconds,
        "generated_tokens_per_second": outcome.pace[0],
        "trained_tokens_per_second": outcome.pace[1],
        "ttft_ms_p50_p99": quantiles(outcome.ttfts),
        "tpot_ms_p50_p99": quantiles(outcome.tpots),
        "itl_ms_p50_p99": quantiles(outcome.gaps),
        "wait_ms_p50_p99": quantiles(outcome.waits),
        "model_error_p95": common.quantile(outcome.errors, 0.95),
        "preemptions": outcome.preemptions,
        "evictions": outcome.evictions,
        "steps": outcome.steps,
    }


def arithmetic(how: argparse.Namespace, outcome: Outcome) -> float:
    """The part of the device's arithmetic that the requests took (were no prefix cached), by what a generated
    token and its part of a prompt cost."""
    costs = CostModel(DEVICES[how.device], SHAPES[how.shape])
    begun = [s for s in (*outcome.served, *outcome.pending) if s.tokens]
    seconds = sum(costs.request_seconds(s.arrival.prompt_tokens, s.tokens) for s in begun)
    return outcome.pace[0] * seconds / max(1, sum(s.tokens for s in begun))


def tell(row: dict[str, Any], alone: float) -> str:
    """A load's line for whoever waits; `alone` is the goodput without training."""
    return (
        f"load {row['load']:.2f}: U {row['u']:.2f} of {row['u_most']:.2f} ({row['u_at_target']:.2f} by what "
        f"the target lets through), eta {row['eta']:.2f}, "
        f"rho {row['rho']:.2f}, goodput {row['goodput']:.3f} ({alone:.3f} alone) at {row['target_tpot_ms']} "
        f"ms, TPOT {row['tpot_ms_p50_p99']}, ITL {row['itl_ms_p50_p99']}, TTFT {row['ttft_ms_p50_p99']} ms"
    )


def measure(how: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Column]]:
    """Rows of all runs, and what the plot shows of them."""
    caps = how.prompt_tokens, how.output_tokens
    arrivals = traces.load(how.trace, max(how.seconds, 3600.0), how.seed, *caps)
    arrivals = traces.capped(arrivals, *caps)
    flood = saturation(simulator(how, 0), arrivals[:SATURATING])
    limit, token_limit, points = flood.requests, flood.tokens, saturated(how, arrivals)
    alone = describe(simulator(how, how.jobs).run([], how.seconds))
    rows: list[dict[str, Any]] = [{"load": 0.0, "arrangement": "training alone", **alone}]
    columns: list[Column] = []
    for load in how.load or ((0.5,) if how.quick else LOADS):
        shaped = traces.at_rate(arrivals, load * limit, how.seconds)
        asked = how.slo_tpot_ms / 1e3
        serving = simulator(how, 0, asked).run(shaped, how.seconds, warm=how.warm)
        if how.slo_tpot_ratio:
            asked = how.slo_tpot_ratio * (common.quantile(serving.tpots, 0.5) or 0.0)
            serving = simulator(how, 0, asked).run(shaped, how.seconds, warm=how.warm)
        # The automatic target promises each step a ratio; requests are held to it at the alone run's p99.
        target = asked or max(AUTO_FLOOR, AUTO_RATIO * (common.quantile(serving.tpots, 0.99) or 0.0))
        both = simulator(how, how.jobs, asked).run(shaped, how.seconds, warm=how.warm)
        columns.append(Column(load, serving, both, target))
        pair = [
            {
                "load": load,
                "arrangement": name,
                "target_tpot_ms": round(target * 1e3, 3),
                "goodput": outcome.goodput(target, how.slo_ttft_ms / 1e3 or float("inf")),
                **describe(outcome),
            }
            for name, outcome in (("requests alone", serving), ("both", both))
        ]
        row = pair[1]
        row["eta"] = row["trained_tokens_per_second"] / alone["trained_tokens_per_second"]
        row["u"] = row["eta"] + row["generated_tokens_per_second"] / token_limit
        row["u_at_target"] = row["eta"] + row["generated_tokens_per_second"] / within(points, target)
        row["u_most"] = row["u"] - row["eta"] + max(0.0, 1.0 - arithmetic(how, serving))
        row["rho"] = row["itl_ms_p50_p99"][1] / max(pair[0]["itl_ms_p50_p99"][1], 1e-9)
        rows += pair
        print(tell(row, pair[0]["goodput"]), file=sys.stderr)
    return rows, columns


def main() -> None:
    """Measure and write the result; 2 for a trace that can't be read or a model that doesn't fit."""
    how = options()
    began = time.perf_counter()
    try:
        rows, columns = measure(how)
    except (traces.TraceError, ConfigError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    took = time.perf_counter() - began
    half = min((row for row in rows if row["arrangement"] == "both"), key=lambda row: abs(row["load"] - 0.5))
    title = f"{how.shape} on {how.device}, {how.trace} arrivals"
    if how.plot:
        draw(how.plot, columns, f"Simulated: {title}")
    mine, peer = half["trained_tokens_per_second"], rows[0]["trained_tokens_per_second"]
    headline = {
        "what": f"simulated: trained tokens/s beside requests; {title}; peer: training alone",
        "coserve": mine,
        "peer": peer,
        "unit": "tokens/s",
        "ratio": mine / peer,
        "spread": [mine / peer, mine / peer],
        "load": {
            "trace": how.trace,
            "of_saturation": half["load"],
            "prompt_tokens": how.prompt_tokens,
            "output_tokens": how.output_tokens,
        },
    }
    settings = {name: str(value) for name, value in vars(how).items()}
    simulated = how.seconds * (1 + 2 * len(columns))
    pace = {"settings": settings, "wall_seconds": took, "simulated_seconds_per_second": simulated / took}
    common.write("simulate", how.out, {"headline": headline, "rows": rows, **pace})


if __name__ == "__main__":
    main()
