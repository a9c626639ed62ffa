"""What a run looked like: latencies, training's share and the queue, a column for each load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulation.server import Outcome

BINS = 60  # of the time axis
ALONE, BOTH, TARGET = "#7f7f7f", "#1f6fb4", "#c23b22"


@dataclass(frozen=True)
class Column:
    """A load's two runs over the same arrivals, and its TPOT target in seconds."""

    load: float
    alone: Outcome
    both: Outcome
    target: float


def draw(path: Path, columns: Sequence[Column], title: str) -> None:
    """Write a PNG (or whatever the name's ending says): the distributions of ITL and TTFT, then over
    simulated time training's share of the device and the requests in hand."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    size = (1.0 + 3.4 * len(columns), 9.0)
    figure, axes = plt.subplots(4, len(columns), figsize=size, squeeze=False, sharex="row", sharey="row")
    for place, column in enumerate(columns):
        gaps, firsts, share, queue = (axes[row][place] for row in range(4))
        gaps.set_title(f"load {column.load:.0%}")
        gaps.axvline(column.target * 1e3, color=TARGET, linewidth=1, linestyle="--", label="target")
        for outcome, colour, label in (
            (column.alone, ALONE, "requests alone"),
            (column.both, BOTH, "with training"),
        ):
            _distribution(gaps, outcome.gaps, colour, label)
            _distribution(firsts, outcome.ttfts, colour, label)
            _over_time(queue, outcome, [s.running + s.waiting for s in outcome.samples], colour, label)
        _over_time(share, column.both, [s.share for s in column.both.samples], BOTH, "with training")
        for axis in (gaps, firsts):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        share.set_ylim(0, 1.02)
        queue.set_yscale("symlog", linthresh=1)  # linear up to one
        queue.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        gaps.set_xlabel("between tokens, ms")
        firsts.set_xlabel("to the first token, ms")
        queue.set_xlabel("simulated seconds")
        share.set_xlabel("simulated seconds")
    axes[3][0].set_ylim(bottom=0)
    labels = ("part of the tokens", "part of the requests", "training's share", "requests in hand")
    for row, label in enumerate(labels):
        axes[row][0].set_ylabel(label)
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _distribution(axis: Any, seconds: Sequence[float], colour: str, label: str) -> None:
    """The part of the values that is at most x milliseconds, on a logarithmic axis."""
    ordered = sorted(seconds)
    count = len(ordered)
    picked = sorted({round(place * (count - 1) / 400) for place in range(401)}) if count else []
    axis.plot(
        [ordered[i] * 1e3 for i in picked], [(i + 1) / count for i in picked], color=colour, label=label
    )
    axis.grid(alpha=0.3)


def _over_time(axis: Any, outcome: Outcome, values: Sequence[float], colour: str, label: str) -> None:
    """Means of the samples in `BINS` equal parts of the time."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for sample, value in zip(outcome.samples, values, strict=True):
        bins[min(BINS - 1, int(sample.time / outcome.seconds * BINS))].append(value)
    points = [(i, sum(b) / len(b)) for i, b in enumerate(bins) if b]
    moments = [(i + 0.5) * outcome.seconds / BINS for i, _ in points]
    axis.plot(moments, [value for _, value in points], color=colour, label=label, linewidth=1)
    axis.grid(alpha=0.3)
