"""Rates and percentiles of the demo's phases, and the table and lines that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from examples.demo.load import Answer

PHASES = ("before", "during", "after")


@dataclass
class Training:
    """What the job's events have said so far; `losses` in step order."""

    step: int = 0
    total_steps: int = 0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    status: str = ""
    message: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Mean over the last steps, which evens out their lengths."""
        recent = self.rates[-10:]
        return sum(recent) / len(recent) if recent else 0.0


@dataclass(frozen=True)
class Figures:
    """One phase of the chat: rates in tokens/s, latencies in milliseconds."""

    phase: str
    requests: int
    failed: int
    tokens_per_second: float
    first_p50: float
    gap_p50: float
    gap_p99: float


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile, `share` in 0-1; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def figures(phase: str, answers: Sequence[Answer], seconds: float) -> Figures:
    """The figures of the answers that began in `phase`, which lasted `seconds`."""
    mine = [answer for answer in answers if answer.phase == phase]
    gaps = [gap * 1000 for answer in mine for gap in answer.gaps]
    first = [(answer.arrivals[0] - answer.started) * 1000 for answer in mine if answer.arrivals]
    return Figures(
        phase=phase,
        requests=len(mine),
        failed=sum(bool(answer.error) for answer in mine),
        tokens_per_second=sum(answer.tokens for answer in mine) / max(seconds, 1e-9),
        first_p50=percentile(first, 0.5),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
    )


def phase_table(rows: Sequence[Figures], training: Training) -> Table:
    """Chat and training side by side, one row a phase."""
    table = Table(title="Chat and training on one copy of the weights", title_justify="left")
    for name in (
        "phase",
        "requests",
        "failed",
        "chat tok/s",
        "TTFT p50",
        "ITL p50",
        "ITL p99",
        "train tok/s",
    ):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in rows:
        table.add_row(
            row.phase,
            str(row.requests),
            str(row.failed),
            f"{row.tokens_per_second:.1f}",
            f"{row.first_p50:.1f} ms",
            f"{row.gap_p50:.1f} ms",
            f"{row.gap_p99:.1f} ms",
            f"{training.tokens_per_second:.0f}" if row.phase == "during" else "-",
        )
    return table


def line(row: Figures, training: Training) -> str:
    """The same in one line of plain text."""
    text = (
        f"[{row.phase}] chat {row.tokens_per_second:.1f} tok/s, inter-token p50 {row.gap_p50:.1f} ms "
        f"p99 {row.gap_p99:.1f} ms, {row.failed} failed"
    )
    if row.phase == "during" and training.losses:
        text += (
            f" | training {training.tokens_per_second:.0f} tok/s, "
            f"step {training.step}/{training.total_steps}, loss {training.losses[-1]:.3f}"
        )
    return text
