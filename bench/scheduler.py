"""What deciding costs: `schedule` and `commit` of a decoding step, plain and with classes and tenants.

Admission too. No model and no clock: steps are said to take 10 ms. The best of many counts.
"""

from __future__ import annotations

import time

import common

from coserve.core.admission import Admission
from coserve.core.block_pool import BlockPool
from coserve.core.latency_model import LatencyModel
from coserve.core.request import Request
from coserve.core.sampling_params import SamplingParams
from coserve.core.scheduler import Scheduler, SchedulerLimits
from coserve.core.slo import LatencyTargets

STEPS, WARM, CONTEXT = 300, 50, 64
CLASSES = (LatencyTargets(ttft=0.2, tpot=0.05), LatencyTargets(tpot=0.1), None)


class Decisions:
    """`requests` that decode; `mixed`: of three latency classes and four tenants."""

    def __init__(self, requests: int, mixed: bool) -> None:
        self.model = LatencyModel()
        limits = SchedulerLimits(256, 2048, 16, 8)
        self.scheduler = Scheduler(
            limits, BlockPool(8192), self.model, LatencyTargets(), lambda digest: True, lambda digest: None
        )
        self.mixed = mixed
        for number in range(requests):
            self.scheduler.add(self.request(number))

    def request(self, number: int) -> Request:
        """One that decodes for as long as it is asked to."""
        return Request(
            f"r{number}",
            list(range(CONTEXT)),
            SamplingParams(max_tokens=10**6),
            targets=CLASSES[number % 3] if self.mixed else None,
            tenant=f"t{number % 4}" if self.mixed else "",
            arrival=number * 1e-3,
            max_model_len=10**6,
        )

    def step(self) -> float:
        """Microseconds of the decisions of one step."""
        began = time.perf_counter_ns()
        plan = self.scheduler.schedule(1.0)
        self.scheduler.commit(plan, 0.0)
        took = time.perf_counter_ns() - began
        for span in plan.inference:
            span.request.append(1)
        self.model.observe_inference(plan.inference_tokens, plan.context_tokens, 0.01)
        return took / 1e3

    def best_step(self) -> float:
        """Of many, the first ones apart."""
        return min([self.step() for _ in range(WARM + STEPS)][WARM:])

    def best_arrival(self, waiting: int) -> float:
        """Microseconds in which an arrival is let in or refused, with so many waiting."""
        for number in range(1000, 1000 + waiting):
            self.scheduler.add(self.request(number))
        admission, times = Admission(self.scheduler), []
        for number in range(STEPS):
            request = self.request(3 * number + 5001)
            request.targets = LatencyTargets(ttft=1e6)
            began = time.perf_counter_ns()
            admission.check(request, 20.0)
            times.append((time.perf_counter_ns() - began) / 1e3)
        return min(times)


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    rounds = 2 if options.quick else 7
    rows, mine, theirs = [], [], []
    for requests in (1, 2, 4, 8, 32):
        plain = [Decisions(requests, mixed=False).best_step() for _ in range(rounds)]
        mixed = [Decisions(requests, mixed=True).best_step() for _ in range(rounds)]
        rows.append({"requests": requests, "plain": min(plain), "mixed": min(mixed), "unit": "us a step"})
        if requests == 8:
            mine, theirs = plain, mixed
    for waiting in (10, 100, 1000):
        decisions = Decisions(8, mixed=True)
        decisions.best_step()
        took = decisions.best_arrival(waiting)
        rows.append({"waiting": waiting, "admission": took, "unit": "us an arrival with a target"})
    load = {"concurrency": 8, "prompt_tokens": CONTEXT, "output_tokens": STEPS}
    what = (
        "us of schedule and commit, 8 decoding requests; the peer: of three latency classes and four tenants"
    )
    headline = common.headline(what, "us", mine, theirs, load)
    common.write("scheduler", options.out, {"headline": headline, "rows": rows})


if __name__ == "__main__":
    main()
