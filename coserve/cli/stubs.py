"""The gRPC stubs with their messages; imported by a command once it needs them, since grpc takes its time."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from coserve.server.grpc_gen import adapters_pb2, adapters_pb2_grpc, fine_tuning_pb2, fine_tuning_pb2_grpc

if TYPE_CHECKING:
    import grpc


def fine_tuning(
    channel: grpc.Channel,
) -> tuple[ModuleType, fine_tuning_pb2_grpc.FineTuningServiceStub]:
    """Messages and stub of `coserve.v1.FineTuningService`."""
    return fine_tuning_pb2, fine_tuning_pb2_grpc.FineTuningServiceStub(channel)


def adapters(channel: grpc.Channel) -> tuple[ModuleType, adapters_pb2_grpc.AdapterServiceStub]:
    """Messages and stub of `coserve.v1.AdapterService`."""
    return adapters_pb2, adapters_pb2_grpc.AdapterServiceStub(channel)
