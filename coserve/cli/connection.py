"""How the client commands reach a server: their common flags, the gRPC channel, and errors in plain words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coserve.cli.failure import CommandFailed

if TYPE_CHECKING:
    import grpc

CHUNK_BYTES = 256 * 1024

Grpc = Annotated[str, typer.Option("--grpc", metavar="HOST:PORT", help="The server's gRPC address.")]
Url = Annotated[str, typer.Option("--url", metavar="URL", help="The server's HTTP address.")]
ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key", metavar="KEY", envvar="COSERVE_API_KEY", help="A key, where the server wants one."
    ),
]
DEFAULT_GRPC = "127.0.0.1:50051"
DEFAULT_URL = "http://127.0.0.1:8000"


def metadata(api_key: str) -> list[tuple[str, str]]:
    """gRPC metadata that carries the key; empty without one."""
    return [("authorization", f"Bearer {api_key}")] if api_key else []


def no_server(address: str) -> CommandFailed:
    """What to say when nothing answers at `address`."""
    return CommandFailed(f"no server answers at {address}; start one with: coserve serve")


@contextlib.contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    """A gRPC channel; an RpcError raised inside becomes a CommandFailed with the server's words."""
    import grpc

    limit = [("grpc.max_receive_message_length", 64 * 2**20)]
    with grpc.insecure_channel(address, options=limit) as opened:
        try:
            yield opened
        except grpc.RpcError as error:
            raise failure_of(error, address) from None


def failure_of(error: Any, address: str) -> CommandFailed:
    """A gRPC error in one line; wrong values exit with 2 as a wrong flag does."""
    import grpc

    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE and not details.startswith("The "):
        return no_server(address)
    if status is grpc.StatusCode.UNAUTHENTICATED:
        return CommandFailed(f"{details} Pass a key with --api-key or in COSERVE_API_KEY.")
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        return CommandFailed(details, exit_code=2)
    return CommandFailed(details or status.name)


def chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces fit for one message."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
