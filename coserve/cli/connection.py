"""How the client commands reach a server: their common flags, the gRPC channel, and errors in plain words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coserve.cli.endpoint import Endpoint, parse_endpoint, silence, trouble
from coserve.cli.failure import CommandFailed

if TYPE_CHECKING:
    import grpc

CHUNK_BYTES = 256 * 1024

Grpc = Annotated[
    str,
    typer.Option(
        "--grpc", metavar="HOST:PORT", help="The server's gRPC address; grpcs://HOST:PORT where it has TLS."
    ),
]
Url = Annotated[
    str,
    typer.Option("--url", metavar="URL", help="The server's HTTP address; https://... where it has TLS."),
]
CaCert = Annotated[
    str,
    typer.Option(
        "--ca-cert", metavar="FILE", help="CA to trust, in PEM, where the server's certificate is private."
    ),
]
ClientCert = Annotated[
    str,
    typer.Option(
        "--client-cert",
        metavar="FILE",
        envvar="COSERVE_CLIENT_CERT",
        help="Our certificate and its key, in one PEM file, where the server asks for one.",
    ),
]
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


@contextlib.contextmanager
def channel(address: str, ca_cert: str = "", client_cert: str = "") -> Iterator[grpc.Channel]:
    """A gRPC channel, with TLS where the address says so.

    An RpcError raised inside becomes a CommandFailed with the server's words. Raises ConfigError for an
    address, a CA or a certificate that is none, CommandFailed for a server that can't be reached by TLS.
    """
    endpoint = parse_endpoint("--grpc", address, ca_cert, client_cert)
    import grpc

    with _open(endpoint) as opened:
        try:
            yield opened
        except grpc.RpcError as error:
            raise failure_of(error, endpoint) from None


def _open(endpoint: Endpoint) -> grpc.Channel:
    import grpc

    limit = [("grpc.max_receive_message_length", 64 * 2**20)]
    if not endpoint.tls:
        return grpc.insecure_channel(endpoint.target, options=limit)
    found = trouble(endpoint)  # asked first: gRPC would write its own story of a bad handshake to stderr
    if found is not None:
        raise found
    own = Path(endpoint.client_cert).read_bytes() if endpoint.client_cert else None
    credentials = grpc.ssl_channel_credentials(Path(endpoint.roots).read_bytes(), own, own)
    return grpc.secure_channel(endpoint.target, credentials, options=limit)


def failure_of(error: Any, endpoint: Endpoint) -> CommandFailed:
    """A gRPC error in one line; wrong values exit with 2 as a wrong flag does."""
    import grpc

    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE and not details.startswith("The "):
        return silence(endpoint, details)
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
