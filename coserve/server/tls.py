"""TLS of both servers from one set of files: certificate and key, the CA of clients, their reload on change.

A change makes a whole new context; new handshakes take it, connections that stand go on. Files that don't fit
together (one was written, the other not yet) leave the old ones in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from coserve.config import ServerConfig
from coserve.errors import ConfigError
from coserve.log import line

logger = logging.getLogger(__name__)

_LOOK_EVERY = 1.0  # seconds between looks at the files' times
_ALPN = ["http/1.1"]


@dataclass(frozen=True)
class _Loaded:
    """One reading of the files, good as a whole."""

    context: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration
    stamp: tuple[tuple[int, ...], ...]


class Tls:
    """What both servers show and ask for. Raises ConfigError naming the flag whose file can't be used."""

    def __init__(self, config: ServerConfig) -> None:
        self._certfile = Path(config.ssl_certfile)
        self._keyfile = Path(config.ssl_keyfile)
        self._ca_certs = Path(config.ssl_ca_certs) if config.ssl_ca_certs else None
        self._verify = ssl.VerifyMode(config.ssl_cert_reqs)
        self._now = self._load()
        self._seen = self._now.stamp
        self._shown = self._now

    @property
    def http_context(self) -> ssl.SSLContext:
        """For the HTTP server; it hands each handshake on to the newest reading of the files."""
        context = self._now.context
        context.sni_callback = self._newest  # called with and without a name in the client's hello
        return context

    def _newest(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if connection.context is not self._now.context:
            connection.context = self._now.context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For the gRPC server. Its library can ask for a client's certificate or not; what is optional over
        HTTP isn't asked for here."""
        return grpc.dynamic_ssl_server_credentials(
            self._now.grpc, self._newest_grpc, self._verify is ssl.CERT_REQUIRED
        )

    def _newest_grpc(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for each handshake, in a thread of its own; None: as before."""
        newest = self._now
        if self._shown is newest:
            return None
        self._shown = newest
        return newest.grpc

    # ------------------------------------------------------------------ reload

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Read the files again whenever one has changed, for the time of the block."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            self.look()

    def look(self) -> None:
        """Take the files over if they have changed and are good; say so in the log either way."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._now = self._load()
        except ConfigError as error:
            logger.warning(line("TLS files changed and are not used", reason=error.message))
        else:
            logger.info("TLS files read again; new connections use them")

    # ------------------------------------------------------------------ files

    def _stamp(self) -> tuple[tuple[int, ...], ...]:
        """Changes with every change of the files, also when a link among their folders is swapped."""
        found = []
        for path in (self._certfile, self._keyfile, self._ca_certs):
            with contextlib.suppress(OSError):
                if path is not None:
                    status = path.stat()
                    found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _load(self) -> _Loaded:
        stamp = self._stamp()
        key = _read(self._keyfile, "--ssl-keyfile")
        chain = _read(self._certfile, "--ssl-certfile")
        roots = _read(self._ca_certs, "--ssl-ca-certs") if self._ca_certs is not None else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(_ALPN)
        self._load_pair(context)
        if roots is not None:
            self._trust(context, roots)
            context.verify_mode = self._verify
            # A resumed session would not look at the client's certificate again.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return _Loaded(context, grpc.ssl_server_certificate_configuration([(key, chain)], roots), stamp)

    def _load_pair(self, context: ssl.SSLContext) -> None:
        def no_passphrase() -> str:
            raise ConfigError(
                f"--ssl-keyfile {self._keyfile}: the key has a passphrase; store it without "
                "(openssl pkey -in KEY -out NEW).",
                param="ssl_keyfile",
            )

        try:
            context.load_cert_chain(self._certfile, self._keyfile, no_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                why = f"is not the key of the certificate in --ssl-certfile {self._certfile}; give the pair."
            else:
                why = f"and --ssl-certfile {self._certfile}: no key and certificate in PEM can be read there."
            raise ConfigError(f"--ssl-keyfile {self._keyfile} {why}", param="ssl_keyfile") from None

    def _trust(self, context: ssl.SSLContext, roots: bytes) -> None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii", "ignore"))
        except ssl.SSLError:
            raise ConfigError(
                f"--ssl-ca-certs {self._ca_certs}: no certificate in PEM can be read there.",
                param="ssl_ca_certs",
            ) from None


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: can't be read ({error.strerror}).", param=flag[2:].replace("-", "_")
        ) from None
