"""Latency classes: which one a request is served in, by its `service_tier` and its key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coserve.class_metrics import DEFAULT_CLASS
from coserve.core.slo import SAFETY, LatencyTargets
from coserve.errors import PermissionDenied
from coserve.server.auth import Authenticator, Key
from coserve.server.fields import PRIORITIES, Fields

AUTO = "auto"
DEFAULT = DEFAULT_CLASS


@dataclass(frozen=True)
class LatencyClass:
    """Targets, and a `priority` that is added to the request's own: lower goes first."""

    name: str
    targets: LatencyTargets
    priority: int = 0


@dataclass(frozen=True)
class Service:
    """How one request is served: from its key's share (None: an open server), in its class, and at which
    `priority`: its own and its class's."""

    key: Key | None
    latency_class: LatencyClass
    priority: int = 0


class ServiceTiers:
    """The server's classes: `default` (the flags' targets), `priority` (the same, before the others), `flex`
    (after the others, with no target for the first token), and those of the keys file."""

    def __init__(self, default: LatencyTargets, own: Iterable[LatencyClass] = ()) -> None:
        given = (
            LatencyClass(DEFAULT, default),
            LatencyClass("priority", default, -1),
            LatencyClass("flex", replace(default, ttft=0.0), 1),
        )
        self.default = default
        self._classes = {latency_class.name: latency_class for latency_class in (*given, *own)}

    @property
    def names(self) -> tuple[str, ...]:
        """All classes, in the order in which they were made."""
        return tuple(self._classes)

    @property
    def classes(self) -> tuple[LatencyClass, ...]:
        """All classes."""
        return tuple(self._classes.values())

    def read(self, fields: Fields, key: Key | None) -> Service:
        """The class that a request's `service_tier` names, its key's own without one or with "auto"; and its
        `priority`.

        Raises InvalidRequest for a class that doesn't exist, PermissionDenied for a class or a priority that
        the key may not use.
        """
        found = self._class(fields, key)
        priority = fields.integer("priority", 0, *PRIORITIES) or 0
        Authenticator.check_priority(key, priority)
        return Service(key, found, priority + found.priority)

    def _class(self, fields: Fields, key: Key | None) -> LatencyClass:
        allowed = key.classes if key is not None and key.classes else self.names
        wanted = fields.string("service_tier", AUTO, 64)
        if wanted is None or wanted == AUTO:
            return self._classes[allowed[0]]
        found = self._classes.get(wanted)
        if found is None:
            names = ", ".join((AUTO, *allowed))
            raise fields.fail("service_tier", f"must be one of {names}; not {wanted!r}.")
        if wanted not in allowed:
            raise PermissionDenied(
                f"This API key may not use the service tier {wanted!r}; it may use {', '.join(allowed)}.",
                param="service_tier",
            )
        return found

    def own_targets(self, latency_class: LatencyClass) -> LatencyTargets | None:
        """What the engine has to be told of a class; None where it has these targets anyway."""
        return None if latency_class.targets == self.default else latency_class.targets

    def out_of_reach(self, least: LatencyTargets) -> list[str]:
        """A sentence for each target that is below the `least` that one request alone could be held to."""
        step = {"tpot": "a decoding step", "ttft": "the step of a short prompt"}
        found = []
        for latency_class in self.classes:
            is_default = latency_class.name == DEFAULT
            for kind, what in step.items():
                target, could = getattr(latency_class.targets, kind), getattr(least, kind)
                if not 0.0 < target < could or (not is_default and target == getattr(self.default, kind)):
                    continue
                where = "--slo-" + kind + "-ms" if is_default else f"class {latency_class.name}: {kind}_ms"
                found.append(
                    f"{where} {target * 1e3:g} can't be met here: {what} takes {could * SAFETY * 1e3:.2g} ms "
                    f"with one request alone, so {could * 1e3:.2g} is the least; until then training only "
                    "gets what chat leaves idle"
                )
        return found
