"""The gRPC server: our services, health and reflection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coserve.errors import ConfigError
from coserve.server.context import Context
from coserve.server.grpc_adapters import AdapterRpc
from coserve.server.grpc_fine_tuning import FineTuning
from coserve.server.grpc_gen import (
    adapters_pb2,
    adapters_pb2_grpc,
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from coserve.server.grpc_guard import Guard
from coserve.server.grpc_inference import Inference
from coserve.server.tls import Tls

_MAX_MESSAGE = 32 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 1000),  # of one connection; its client lets further calls wait
    ("grpc.so_reuseport", 0),
    # Clients may ping every ten seconds, also between calls; one that does so twice as often is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A machine that is gone without a word is noticed, and its calls end, within these two together.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
SERVICES = (
    fine_tuning_pb2.DESCRIPTOR.services_by_name["FineTuningService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
)


class GrpcServer:
    """Serves the application layer over gRPC."""

    def __init__(self, context: Context, tls: Tls | None = None) -> None:
        self._tls = tls
        self._config = context.config
        self._lifecycle = context.lifecycle
        self._watch: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(interceptors=[Guard(context)], options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server(FineTuning(context), self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterRpc(context), self._server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(context), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen and serve; the port. Raises ConfigError when it can't be had."""
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            if self._tls is not None:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(
                f"--grpc-port {config.grpc_port}: can't listen on {address}.", param="grpc_port"
            )
        await self._server.start()
        self._watch = asyncio.create_task(self._report_health())
        return port

    async def _report_health(self) -> None:
        """Health follows whether the engine answers."""
        answer = health_pb2.HealthCheckResponse
        async with aclosing(self._lifecycle.readiness()) as changes:
            async for ready in changes:
                for service in ("", *SERVICES):
                    await self._health.set(service, answer.SERVING if ready else answer.NOT_SERVING)

    async def set_not_serving(self) -> None:
        """Tell health checkers that the end has begun."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, wait `grace` seconds for the running ones, end them."""
        if self._watch is not None:
            self._watch.cancel()
        await self._server.stop(grace)
