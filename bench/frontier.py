"""What the figures of bench/coserve.py come to: U, eta and rho, the best two processes, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACCEPTABLE = (
    4.0  # times the TPOT p50 of serving alone, that a two-process arrangement may have to be the best
)

Row = dict[str, Any]


def best_arrangement(rows: Sequence[Row], alone_tpot_ms: float) -> Row:
    """Of the rows of two-process arrangements at one load, the one that trains most while its TPOT p50 stays
    within `ACCEPTABLE` times serving alone's; where none does, the one with the shortest TPOT."""
    known = [row for row in rows if row["tpot_ms_p50_p99"][0] is not None]
    if not known:
        raise ValueError("no two-process arrangement has served anything")
    acceptable = [row for row in known if row["tpot_ms_p50_p99"][0] <= ACCEPTABLE * alone_tpot_ms]
    if acceptable:
        return max(acceptable, key=lambda row: row["trained_tokens_per_second"])
    return min(known, key=lambda row: row["tpot_ms_p50_p99"][0])


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known and b isn't 0."""
    return a / b if a is not None and b else None


def shares(
    row: Row, trained_alone: float, saturated: float, serving_alone: Row | None
) -> dict[str, float | None]:
    """eta, the part of training alone that is kept; U, which adds the part of saturation that is served;
    rho, ITL p99 over that of serving alone at the same load."""
    eta = row["trained_tokens_per_second"] / trained_alone
    served = row["generated_tokens_per_second"] / saturated
    alone = serving_alone["itl_ms_p50_p99"][1] if serving_alone else None
    return {"eta": eta, "u": eta + served, "rho": ratio(row["itl_ms_p50_p99"][1], alone)}


def against(ours: Row, peer: Row) -> dict[str, float | None]:
    """Our figures over the peer's: more is better of the first, less of the others."""
    return {
        "trained": ratio(ours["trained_tokens_per_second"], peer["trained_tokens_per_second"]),
        "itl_p99": ratio(ours["itl_ms_p50_p99"][1], peer["itl_ms_p50_p99"][1]),
        "ttft_p99": ratio(ours["ttft_ms_p50_p99"][1], peer["ttft_ms_p50_p99"][1]),
        "tpot_p50": ratio(ours["tpot_ms_p50_p99"][0], peer["tpot_ms_p50_p99"][0]),
        "memory": ratio(ours["memory_bytes"], peer["memory_bytes"]),
    }


COLUMNS = [
    "served by",
    "load",
    "fine-tuned tok/s",
    "eta",
    "U",
    "rho",
    "goodput",
    "TTFT",
    "TPOT",
    "ITL",
    "GiB",
]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each point; latencies are p50/p99 in milliseconds."""

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [" | ".join(COLUMNS), "|".join(["---"] + ["--:"] * (len(COLUMNS) - 1))]
    for row in points(rows):
        latencies = [row[f"{name}_ms_p50_p99"] for name in ("ttft", "tpot", "itl")]
        cells = [label(row), f"{row['load']:.0%}", number(row["trained_tokens_per_second"], 0)]
        cells += [number(row.get(name)) for name in ("eta", "u", "rho", "goodput")]
        cells += ["/".join(number(value, 0) for value in pair) for pair in latencies]
        lines.append(" | ".join([*cells, number(row["memory_bytes"] / (1 << 30), 1)]))
    return "\n".join(f"| {line} |" for line in lines)


def points(rows: Sequence[Row]) -> list[Row]:
    """The rows that are a replay at some load."""
    return [row for row in rows if row.get("load") is not None and "ttft_ms_p50_p99" in row]


PANELS = (  # title, and a row's figure
    ("fine-tuned tokens/s", lambda row: row["trained_tokens_per_second"]),
    ("U = FT/alone + INF/saturated", lambda row: row.get("u")),
    ("rho = ITL p99 with / without training", lambda row: row.get("rho")),
    ("TPOT p50, ms", lambda row: row["tpot_ms_p50_p99"][0]),
    ("ITL p99, ms", lambda row: row["itl_ms_p50_p99"][1]),
    ("TTFT p99, ms", lambda row: row["ttft_ms_p50_p99"][1]),
    ("goodput at the target", lambda row: row.get("goodput")),
    ("memory, GiB", lambda row: row["memory_bytes"] / (1 << 30)),
)


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """A panel for each figure over the load, a line for each way to serve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[Row]] = {}
    for row in points(rows):
        lines.setdefault(label(row), []).append(row)
    colors = plt.colormaps["tab20"].colors
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), sharex=True)
    for (name, figure_of), panel in zip(PANELS, axes.flat, strict=True):
        for index, (line, of_line) in enumerate(lines.items()):
            known = [(row["load"] * 100, value) for row in of_line if (value := figure_of(row)) is not None]
            style = "o-" if of_line[0]["server"] == "coserve" else "s--"
            known.sort()
            if known:
                panel.plot(*zip(*known, strict=True), style, label=line, color=colors[index % 20])
        panel.set_title(name, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlim(0, 100)
    for panel in axes[1]:
        panel.set_xlabel("load, % of saturation")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.04 + 0.02 * (len(lines) // 4), 1, 1))
    figure.savefig(path, dpi=110)


def label(row: Row) -> str:
    """What a row's line is called."""
    words = [str(row["server"]), str(row["arrangement"])]
    if row["arrangement"] == "coserve":
        words = ["coserve", f"target {row['target']}"]
    return ", ".join(words)
