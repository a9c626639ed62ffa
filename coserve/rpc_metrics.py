"""Calls by route and by method, under the names that instrumented servers share: `http_*` as vLLM's, `grpc_*`
as go-grpc-prometheus'. A label has a route's template, never a path that a client made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

NO_ROUTE = "none"  # refused before a route was found
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RpcMetrics:
    """Counts and times calls on both ports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._http = Counter(
            "http_requests",
            "HTTP requests by method, status and route.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request to the end of its answer, streams included.",
            ("method", "handler"),
            buckets=_SECONDS,
            registry=registry,
        )
        rpc = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter("grpc_server_started", "Calls begun, by method.", rpc, registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls ended, by method and code.", (*rpc, "grpc_code"), registry=registry
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "From a call to its end, by method.",
            rpc,
            buckets=_SECONDS,
            registry=registry,
        )

    def http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """A request was answered; `handler` is its route's template, `status` 0 for a client that left."""
        method = method if method in _METHODS else "other"
        self._http.labels(method, f"{(status or 499) // 100}xx", handler).inc()
        self._http_seconds.labels(method, handler).observe(seconds)

    def grpc(self, kind: str, method: str) -> Callable[[str], None]:
        """A call of "/service/method" begins; what is returned takes its code ("OK", "NotFound") at its end.
        `kind` is such as "unary_stream"."""
        service, _, name = method.removeprefix("/").partition("/")
        kind = {"unary_stream": "server_stream", "stream_unary": "client_stream"}.get(kind, "unary")
        started = time.monotonic()
        self._started.labels(kind, service, name).inc()

        def ended(code: str) -> None:
            self._handled.labels(kind, service, name, code).inc()
            self._handling.labels(kind, service, name).observe(time.monotonic() - started)

        return ended
