"""The scheduler on a simulated device: latency, training share and queue over an arrival trace, at several
loads.

`coserve/core` as it is, on a roofline of this CPU (`--device cpu`) or of an H200, for the 0.5B, 1B, 8B or
70B shape. Saturation is measured first, by the same simulator; then each load runs three ways: requests
alone, training alone, both. `eta` is the part of training alone that is kept beside requests; `U` adds the
part of saturation that is served.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import common
import traces
from simulator import DEVICES, SHAPES, Outcome, Simulator, TrainingJob, saturation

from coserve.core.slo import LatencyTargets

LOADS = (0.25, 0.5, 0.75, 0.95)
SATURATING = 500  # requests
CAPS = {"cpu": (512, 128), "h200": (8192, 1024)}  # prompt and output tokens, so that a trace fits the device


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file (default: under bench/results)")
    parser.add_argument("--quick", action="store_true", help="one load, a short trace")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--trace", default="azure", help="azure, mooncake, servegen, poisson or bursty")
    parser.add_argument("--seconds", type=float, default=600.0, help="simulated time of each run")
    parser.add_argument("--slo-tpot-ms", type=float, default=0.0, help="0: automatic")
    parser.add_argument("--slo-ttft-ms", type=float, default=0.0)
    parser.add_argument("--adapters", type=int, default=0, help="adapters that requests draw from (Zipf)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write a PNG of latency, share and queue over time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def simulator(how: argparse.Namespace, jobs: int) -> Simulator:
    """A fresh server."""
    targets = LatencyTargets(ttft=how.slo_ttft_ms / 1e3, tpot=how.slo_tpot_ms / 1e3)
    work = [TrainingJob(f"job-{index}") for index in range(jobs)]
    device, shape = DEVICES[how.device], SHAPES[how.shape]
    return Simulator(device, shape, targets=targets, jobs=work, adapters=how.adapters, seed=how.seed)


def describe(outcome: Outcome) -> dict[str, Any]:
    """The figures of a run; times in milliseconds."""

    def quantiles(values: list[float]) -> list[float]:
        return [round(outcome.quantile(values, q) * 1e3, 3) for q in (0.5, 0.99)]

    return {
        "served": len(outcome.served),
        "unfinished": outcome.unfinished,
        "requests_per_second": len(outcome.served) / outcome.seconds,
        "trained_tokens_per_second": sum(outcome.trained_tokens.values()) / outcome.seconds,
        "ttft_ms_p50_p99": quantiles(outcome.ttfts),
        "tpot_ms_p50_p99": quantiles([s.tpot for s in outcome.served if s.tpot is not None]),
        "itl_ms_p50_p99": quantiles(outcome.gaps),
        "wait_ms_p50_p99": quantiles(outcome.waits),
        "model_error_p95": outcome.quantile(outcome.errors, 0.95),
        "preemptions": outcome.preemptions,
        "evictions": outcome.evictions,
        "steps": outcome.steps,
    }


def measure(how: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[float, Outcome]]:
    """Rows of all runs, and the outcomes with both kinds of work, by load."""
    caps = CAPS[how.device]
    arrivals = traces.capped(traces.load(how.trace, max(how.seconds, 3600.0), how.seed), *caps)
    limit = saturation(simulator(how, 0), arrivals[:SATURATING])
    rows: list[dict[str, Any]] = []
    both: dict[float, Outcome] = {}
    alone = describe(simulator(how, how.jobs).run([], how.seconds))
    rows.append({"load": 0.0, "arrangement": "training alone", **alone})
    for load in (0.5,) if how.quick else LOADS:
        shaped = traces.at_rate(arrivals, load * limit, how.seconds)
        serving = describe(simulator(how, 0).run(shaped, how.seconds))
        rows.append({"load": load, "arrangement": "requests alone", **serving})
        both[load] = simulator(how, how.jobs).run(shaped, how.seconds)
        row = {"load": load, "arrangement": "both", **describe(both[load])}
        row["eta"] = row["trained_tokens_per_second"] / alone["trained_tokens_per_second"]
        row["u"] = row["eta"] + row["requests_per_second"] / limit
        row["rho"] = row["itl_ms_p50_p99"][1] / max(serving["itl_ms_p50_p99"][1], 1e-9)
        rows.append(row)
        print(
            f"load {load:.2f}: eta {row['eta']:.2f}, U {row['u']:.2f}, rho {row['rho']:.2f}, "
            f"ITL p50/p99 {row['itl_ms_p50_p99']}, TTFT {row['ttft_ms_p50_p99']} ms",
            file=sys.stderr,
        )
    return rows, both


def plot(path: Path, both: dict[float, Outcome], title: str) -> None:
    """Step length, training's share and the queue over simulated time, a column for each load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        3, len(both), figsize=(4 * len(both), 7), squeeze=False, sharex=True, sharey="row"
    )
    for column, (load, outcome) in enumerate(both.items()):
        moments = [sample.time for sample in outcome.samples]
        series = (
            ("step, ms", [sample.step * 1e3 for sample in outcome.samples]),
            ("training's share", [sample.share for sample in outcome.samples]),
            ("requests", [sample.running + sample.waiting for sample in outcome.samples]),
        )
        for row, (label, values) in enumerate(series):
            axes[row][column].plot(moments, values, linewidth=0.6)
            axes[row][0].set_ylabel(label)
        axes[0][column].set_title(f"load {load:.0%}")
        axes[2][column].set_xlabel("seconds")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and write the result."""
    how = options()
    if how.quick:
        how.seconds = min(how.seconds, 60.0)
    began = time.perf_counter()
    rows, both = measure(how)
    took = time.perf_counter() - began
    half = next(row for row in rows if row["arrangement"] == "both" and row["load"] == 0.5)
    title = f"{how.shape} on {how.device}, {how.trace} arrivals"
    if how.plot:
        plot(how.plot, both, title)
    mine, peer = half["trained_tokens_per_second"], rows[0]["trained_tokens_per_second"]
    prompt, output = CAPS[how.device]
    headline = {
        "what": f"simulated: trained tokens/s beside requests at half load; {title}; peer: training alone",
        "coserve": mine,
        "peer": peer,
        "unit": "tokens/s",
        "ratio": mine / peer,
        "spread": [mine / peer, mine / peer],
        "load": {"trace": how.trace, "of_saturation": 0.5, "prompt_tokens": prompt, "output_tokens": output},
    }
    settings = {name: str(value) for name, value in vars(how).items()}
    simulated = {"settings": settings, "wall_seconds": took}
    common.write("simulate", how.out, {"headline": headline, "rows": rows, **simulated})


if __name__ == "__main__":
    main()
