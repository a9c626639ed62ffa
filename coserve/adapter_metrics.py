"""Which adapters are loaded, and who asks for them: for gateways that send a request where its adapter is.

Names in labels are bounded by what is loaded; a series goes when its adapter does.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

NOT_LOADED = "(not loaded)"  # no adapter's name has a bracket


@dataclass(frozen=True, order=True)
class LoadedAdapter:
    """A version whose weights are on a tier above the disk."""

    name: str
    tier: str
    pinned: bool


class AdapterMetrics(Collector):
    """Filled in by snapshots; what it tells is made anew at each scrape."""

    def __init__(self, max_loras: int) -> None:
        self._max_loras = str(max_loras)
        self._loaded: Counter[LoadedAdapter] = Counter()
        self._requests: dict[str, Mapping[str, int]] = {"running": {}, "waiting": {}}
        self._updated = time.time()

    def requests(self, running: Mapping[str, int], waiting: Mapping[str, int]) -> None:
        """How many requests each adapter has, by its name."""
        self._requests = {"running": running, "waiting": waiting}
        self._updated = time.time()

    def loaded(self, adapters: Iterable[LoadedAdapter]) -> None:
        """All that are in a tier above the disk, once for each version."""
        self._loaded = Counter(adapters)
        self._updated = time.time()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """vLLM's metric and ours."""
        return [self._lora_requests_info(), self._residency(), self._by_adapter()]

    def _lora_requests_info(self) -> GaugeMetricFamily:
        """As the Kubernetes gateway's protocol defines it: "running" are the adapters on the device, ready to
        serve, idle ones too; the value is the time of the update, so that the newest set of labels wins."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device (running_lora_adapters) and those that requests wait for; the value is "
            "the time of the update.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        ready = {adapter.name for adapter in self._loaded if adapter.tier == "device"}
        running = ",".join(sorted(ready | self._requests["running"].keys()))
        waiting = ",".join(sorted(self._requests["waiting"]))
        family.add_metric((self._max_loras, running, waiting), self._updated)
        return family

    def _residency(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "coserve_adapter_residency",
            "Versions of an adapter that are loaded, by tier.",
            labels=("adapter", "tier", "pinned"),
        )
        for adapter, versions in sorted(self._loaded.items()):
            family.add_metric((adapter.name, adapter.tier, str(adapter.pinned).lower()), versions)
        return family

    def _by_adapter(self) -> GaugeMetricFamily:
        """Loaded adapters only: any number of others may be waited for."""
        family = GaugeMetricFamily(
            "coserve_adapter_requests",
            f"Requests by adapter, where it is loaded; {NOT_LOADED} are those of all others.",
            labels=("adapter", "state"),
        )
        names = {adapter.name for adapter in self._loaded} | self._requests["running"].keys()
        for state, counts in self._requests.items():
            for name in sorted(names):
                family.add_metric((name, state), counts.get(name, 0))
            others = sum(count for name, count in counts.items() if name not in names)
            family.add_metric((NOT_LOADED, state), others)
        return family
