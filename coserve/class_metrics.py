"""How each latency class is served: its requests by outcome, and which of its targets they missed.

A class without a target of a kind (0: automatic) can't miss it. Classes are those of the flags and of the
keys file, so the label is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from coserve.core.slo import LatencyTargets

DEFAULT_CLASS = "default"
KINDS = ("ttft", "tpot")
OUTCOMES = ("good", "missed", "refused", "aborted", "failed")


class ClassMetrics:
    """Counters of the classes in `targets`, by name; what is told of the default class also has the names
    without a class."""

    def __init__(self, registry: CollectorRegistry, targets: Mapping[str, LatencyTargets]) -> None:
        self._targets = dict(targets)
        default = self._targets[DEFAULT_CLASS]
        slo = Gauge(
            "coserve_slo_target_seconds",
            "Latency targets of the default class (0: automatic).",
            ("kind",),
            registry=registry,
        )
        own = Gauge(
            "coserve_class_target_seconds",
            "Latency targets by class (0: automatic).",
            ("latency_class", "kind"),
            registry=registry,
        )
        missed = Counter(
            "coserve_slo_missed", "Requests over their class's target.", ("kind",), registry=registry
        )
        missed_by_class = Counter(
            "coserve_class_missed",
            "Requests over their class's target, by class.",
            ("latency_class", "kind"),
            registry=registry,
        )
        requests = Counter(
            "coserve_class_requests",
            "Requests that ended, by class: within its targets, over one, refused by the engine, left by the "
            "client, or failed.",
            ("latency_class", "outcome"),
            registry=registry,
        )
        for kind in KINDS:
            slo.labels(kind).set(getattr(default, kind))
        self._missed = {kind: missed.labels(kind) for kind in KINDS}
        self._missed_of: dict[tuple[str, str], Counter] = {}
        self._requests: dict[tuple[str, str], Counter] = {}
        for name, found in self._targets.items():
            for kind in KINDS:
                own.labels(name, kind).set(getattr(found, kind))
                self._missed_of[name, kind] = missed_by_class.labels(name, kind)
            for outcome in OUTCOMES:
                self._requests[name, outcome] = requests.labels(name, outcome)

    def first_token(self, name: str, seconds: float) -> None:
        """A request of the class had its first token after so long."""
        self._judge(name, "ttft", seconds)

    def refused(self, name: str) -> None:
        """The engine refused a request: its target was out of reach, or the queue full."""
        self._requests[name, "refused"].inc()

    def ended(
        self, name: str, reason: str, waited: float, has_first_token: bool, per_token: float | None
    ) -> None:
        """A request ended by `reason` (a finish reason): `waited` seconds from its arrival to its first
        token, or to its end without one; `per_token` for each of the others, None where there are none."""
        late = 0.0 < self._targets[name].ttft < waited
        if late and not has_first_token:
            self._judge(name, "ttft", waited)
        slow = per_token is not None and self._judge(name, "tpot", per_token)
        if reason == "error":
            outcome = "failed"
        elif late or slow:
            outcome = "missed"
        else:
            outcome = "aborted" if reason == "abort" else "good"
        self._requests[name, outcome].inc()

    def _judge(self, name: str, kind: str, seconds: float) -> bool:
        """Whether it is over the class's target; counts it then."""
        if not 0.0 < getattr(self._targets[name], kind) < seconds:
            return False
        self._missed[kind].inc()
        self._missed_of[name, kind].inc()
        return True
