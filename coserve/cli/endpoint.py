"""Where a server is as the flags write it: scheme, host, port, trusted certificates; and why it is silent."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

import certifi

from coserve.cli.failure import CommandFailed
from coserve.cli.values import existing_file
from coserve.errors import ConfigError

_PROBE_SECONDS = 5.0
_TLS_BY_SCHEME = {
    "--grpc": {"": False, "grpc": False, "grpcs": True},
    "--url": {"http": False, "https": True},
}
_FORMS = {
    "--grpc": "HOST:PORT, or grpcs://HOST:PORT for TLS",
    "--url": "http://HOST:PORT, or https://HOST:PORT for TLS",
}
# OpenSSL's X509_V_ERR_* that say: nobody trusted has signed this.
_UNKNOWN_SIGNER = frozenset({18, 19, 20, 21})


@dataclass(frozen=True)
class Endpoint:
    """A server's address. `text` is the value of `flag` as it was given; `ca_cert` the file with the CA to
    trust, empty for the well-known ones; `client_cert` the one with our own certificate and key, if any."""

    flag: str
    text: str
    host: str
    port: int
    tls: bool
    ca_cert: str = ""
    client_cert: str = ""

    @property
    def target(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def roots(self) -> str:
        """The file with the CAs to trust."""
        return self.ca_cert or certifi.where()

    def trust(self) -> ssl.SSLContext:
        """What a TLS connection accepts and shows; ConfigError for a file that holds no certificate."""
        try:
            context = ssl.create_default_context(cafile=self.roots)
        except OSError:  # ssl.SSLError is one
            raise ConfigError(
                f"--ca-cert {self.ca_cert}: no certificate in PEM can be read from it.", param="--ca-cert"
            ) from None
        if self.client_cert:
            try:
                context.load_cert_chain(self.client_cert, password=lambda: "")
            except ssl.SSLError:
                raise ConfigError(
                    f"--client-cert {self.client_cert}: it must hold a certificate and its key, in PEM and "
                    "without a passphrase.",
                    param="--client-cert",
                ) from None
        # What `openssl req -x509` makes lacks extensions that only this flag asks of a CA.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


def parse_endpoint(flag: str, text: str, ca_cert: str, client_cert: str = "") -> Endpoint:
    """The address in the value of `--grpc` or `--url`; ConfigError naming the flag for anything else."""
    schemes = _TLS_BY_SCHEME[flag]
    scheme, _, rest = text.rpartition("://")
    tls = schemes.get(scheme.lower())
    try:
        parts = urlsplit("//" + rest)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if flag == "--url" and port is None and host:
        port = 443 if tls else 80
    if tls is None or not host or not port:
        raise ConfigError(f"{flag} {text}: write {_FORMS[flag]}.", param=flag)
    files = {"--ca-cert": ca_cert, "--client-cert": client_cert}
    for name, path in files.items():
        if path and not tls:
            secure = next(name for name, wanted in schemes.items() if wanted)
            raise ConfigError(
                f"{name} is of use with TLS only; write {flag} {secure}://HOST:PORT.", param=name
            )
        files[name] = str(existing_file(path, name)) if path else ""
    return Endpoint(flag, text, host, port, tls, *files.values())


def silence(endpoint: Endpoint, said: str) -> CommandFailed:
    """Why a call wasn't answered; `said` is what it said itself, for want of anything better."""
    return trouble(endpoint) or CommandFailed(f"no server answers at {endpoint.text}: {said}")


def trouble(endpoint: Endpoint) -> CommandFailed | None:
    """What a connection and a TLS handshake find wrong with an address; None for nothing."""
    try:
        problem = _handshake(endpoint)
    except OSError:
        return CommandFailed(f"no server answers at {endpoint.text}; start one with: coserve serve")
    if isinstance(problem, ssl.SSLCertVerificationError):
        hint = (
            "; --ca-cert FILE names the CA that signed it" if problem.verify_code in _UNKNOWN_SIGNER else ""
        )
        return CommandFailed(
            f"the certificate of {endpoint.target} can't be trusted ({problem.verify_message}){hint}"
        )
    speaks_tls = problem is None
    if speaks_tls and endpoint.tls and _is_refused(endpoint):
        which = (
            "refuses the one in --client-cert"
            if endpoint.client_cert
            else "give yours with --client-cert FILE"
        )
        return CommandFailed(f"the server at {endpoint.target} asks for a client's certificate; {which}")
    if speaks_tls == endpoint.tls:
        return None
    names = {tls: name for name, tls in _TLS_BY_SCHEME[endpoint.flag].items()}
    return CommandFailed(
        f"the server at {endpoint.target} speaks {'TLS' if speaks_tls else 'no TLS'}; "
        f"write {endpoint.flag} {names[speaks_tls]}://{endpoint.target}",
        exit_code=2,
    )


def _is_refused(endpoint: Endpoint) -> bool:
    """Whether the server refuses who comes with our certificate, or without one."""
    # Only up to TLS 1.2 is that a part of the handshake; later it shows with the first answer.
    problem = _handshake(endpoint, ssl.TLSVersion.TLSv1_2)
    return problem is not None and "VERSION" not in (problem.reason or "")  # some just hang up


def _handshake(
    endpoint: Endpoint, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
) -> ssl.SSLError | None:
    """What a TLS handshake comes to: None when it is good. Certificates matter where TLS is asked for.

    Raises OSError when there is no connection.
    """
    context = endpoint.trust()
    context.maximum_version = newest
    if not endpoint.tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((endpoint.host, endpoint.port), _PROBE_SECONDS) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=endpoint.host):
                return None
        except ssl.SSLError as error:
            return error
        except ConnectionError:  # hung up on our greeting
            return ssl.SSLError("no TLS")
