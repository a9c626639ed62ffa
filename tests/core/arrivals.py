"""Requests with latency classes and tenants, for a Simulation."""

from __future__ import annotations

from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.slo import LatencyTargets
from tests.core.simulation import Simulation


def made(
    sim: Simulation,
    name: str,
    prompt: int,
    output: int,
    *,
    priority: int = 0,
    targets: LatencyTargets | None = None,
    tenant: str = "",
    weight: float = 1.0,
) -> Request:
    """A request that comes now and isn't added yet."""
    return Request(
        name,
        list(range(prompt)),
        SamplingParams(max_tokens=output),
        priority=priority,
        targets=targets,
        tenant=tenant,
        weight=weight,
        arrival=sim.now,
        max_model_len=10_000,
    )


def arrive(sim: Simulation, name: str, prompt: int, output: int, **how) -> Request:
    """A request that has come."""
    request = made(sim, name, prompt, output, **how)
    sim.scheduler.add(request)
    return request


def warm(sim: Simulation) -> None:
    """Requests that teach the latency model what steps cost, then time for them to be forgotten otherwise."""
    for size in (1, 8, 20, 40, 60, 64, 30, 12):
        arrive(sim, f"warm {size}", size, 12)
        sim.run()
