"""What the requests of a step ask of it: their latency targets, and how long they have waited already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coserve.core.request import Request
from coserve.core.slo import LatencyTargets


class Demand(NamedTuple):
    """One set of targets: the seconds that the longest-waiting of its requests has had no first token (None:
    all have theirs), whether any of them decodes, and the seconds until the first of those has its next token
    due (None: without an explicit time per token)."""

    targets: LatencyTargets
    wait: float | None
    decodes: bool
    early: float | None = None


def demands_of(
    running: Sequence[Request],
    waiting: Sequence[Request],
    default: LatencyTargets,
    any_own: bool,
    now: float,
) -> list[Demand]:
    """A demand for each set of targets among the requests; `any_own`: some have others than `default`."""
    if not any_own:
        return [_demand(default, (*running, *waiting), now)]
    groups: dict[LatencyTargets, list[Request]] = {}
    for request in (*running, *waiting):
        groups.setdefault(request.targets or default, []).append(request)
    return [_demand(targets, requests, now) for targets, requests in groups.items()]


def _demand(targets: LatencyTargets, requests: Sequence[Request], now: float) -> Demand:
    arrivals = [r.arrival for r in requests if r.num_output_tokens == 0]
    wait = now - min(arrivals) if arrivals else None
    decodes = len(arrivals) < len(requests)
    if targets.tpot == 0.0:
        return Demand(targets, wait, decodes)
    due = (
        targets.due(r.pace_from, r.num_output_tokens)
        for r in requests
        if r.pace_from is not None and r.forward_owed == 1
    )
    first = min(due, default=None)
    return Demand(targets, wait, decodes, None if first is None else first - now)
