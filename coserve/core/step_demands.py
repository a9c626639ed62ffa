"""What the requests of a step ask of it: their latency targets, and how long they have waited already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coserve.core.request import Request
from coserve.core.slo import LatencyTargets


class Demand(NamedTuple):
    """One set of targets: the seconds that the longest-waiting of its requests has had no first token (None:
    all have theirs), and whether any of them decodes."""

    targets: LatencyTargets
    wait: float | None
    decodes: bool


def demands_of(
    running: Sequence[Request],
    waiting: Sequence[Request],
    default: LatencyTargets,
    any_own: bool,
    now: float,
) -> list[Demand]:
    """A demand for each set of targets among the requests; `any_own`: some have others than `default`."""
    if not any_own:
        new = [r for r in (*running, *waiting) if len(r.token_ids) == r.num_prompt_tokens]
        arrivals = [r.arrival for r in new]
        return [Demand(default, now - min(arrivals) if arrivals else None, True)]
    found: dict[LatencyTargets, tuple[float | None, bool]] = {}
    for request in (*running, *waiting):
        targets = request.targets or default
        oldest, decodes = found.get(targets, (None, False))
        if request.num_output_tokens == 0:
            oldest = request.arrival if oldest is None else min(oldest, request.arrival)
        found[targets] = (oldest, decodes or request.num_output_tokens > 0)
    return [Demand(t, None if oldest is None else now - oldest, d) for t, (oldest, d) in found.items()]
