"""Whose request is served next, when those of several tenants wait.

Each tenant has a count of the tokens that it was served, divided by its weight; the one with the least goes
first (the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A
tenant that comes back starts from the least count of those that are there: nobody saves up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from coserve.core.request import Request

GRAIN = 1024.0  # tokens; who is preempted changes no more often than that


class FairShares:
    """Counts of the tenants that have requests. `contended`: there are several, and only then it counts."""

    def __init__(self) -> None:
        self.contended = False
        self._served: dict[str, float] = {}
        self._requests: dict[str, int] = {}

    def join(self, request: Request) -> None:
        """A request has come."""
        tenant = request.tenant
        if tenant not in self._requests:
            self._served[tenant] = self._at_joining(tenant)
        self._requests[tenant] = self._requests.get(tenant, 0) + 1
        self.contended = len(self._requests) > 1

    def leave(self, request: Request) -> None:
        """A request has gone. Counts are forgotten once nobody is left to compare with."""
        tenant = request.tenant
        self._requests[tenant] -= 1
        if self._requests[tenant] == 0:
            del self._requests[tenant]
            self.contended = len(self._requests) > 1
            if not self.contended:
                self._served = dict.fromkeys(self._requests, 0.0)

    def is_alone(self, tenant: str) -> bool:
        """No other tenant has requests."""
        return self._requests.keys() <= {tenant}

    def charge(self, request: Request, tokens: int) -> None:
        """A request was served so many tokens."""
        self._served[request.tenant] += tokens / request.weight

    def rank(self, request: Request) -> tuple[int, float, float, str]:
        """Who keeps its place, least first: by priority, then by its tenant's count in steps of `GRAIN`."""
        count = self._served[request.tenant] // GRAIN
        return (request.priority, count, request.arrival, request.sequence_id)

    def in_turn(self, waiting: Iterable[Request]) -> Iterator[Request]:
        """Requests, given in their own order, in the order of their turns: by priority, then by what their
        tenants were served, each counting what goes before it here."""
        queues: dict[str, deque[Request]] = {}
        for request in waiting:
            queues.setdefault(request.tenant, deque()).append(request)
        served = {t: self._served[t] if t in self._requests else self._at_joining(t) for t in queues}

        def turn(tenant: str) -> tuple[int, float, float]:
            head = queues[tenant][0]
            return (head.priority, served[tenant], head.arrival)

        while queues:
            tenant = min(queues, key=turn)
            request = queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]
            served[tenant] += request.num_tokens / request.weight
            yield request

    def _at_joining(self, tenant: str) -> float:
        least = min((self._served[t] for t in self._requests), default=0.0)
        return max(self._served.get(tenant, 0.0), least)
