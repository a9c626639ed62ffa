"""TLS of the HTTP and the gRPC server: clients' certificates, files that change, and refusals of bad ones."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from coserve.cli import main as command
from coserve.config import EngineConfig, ServerConfig
from coserve.errors import ConfigError
from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from coserve.server.tls import Tls
from tests.server.certificates import Pair, self_signed, signed_by
from tests.server.fake_engine import DEFAULT_REPLY
from tests.server.running import ServerThread, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def first(folder: Path) -> Pair:
    return self_signed(folder / "first")


@pytest.fixture(scope="module")
def second(folder: Path) -> Pair:
    return self_signed(folder / "second")


@pytest.fixture(scope="module")
def clients_ca(folder: Path) -> Pair:
    return self_signed(folder / "clients", subject="clients")


@pytest.fixture(scope="module")
def known(folder: Path, clients_ca: Pair) -> Pair:
    return signed_by(clients_ca, folder / "known", "known")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Pair:
    return signed_by(self_signed(folder / "others", subject="others"), folder / "stranger", "stranger")


def serving(folder: Path, pair: Pair, **settings: object) -> ServerThread:
    return ServerThread(folder, ssl_keyfile=str(pair.key), ssl_certfile=str(pair.certificate), **settings)


@pytest.fixture(scope="module")
def mutual(folder: Path, first: Pair, clients_ca: Pair) -> Iterator[ServerThread]:
    server = serving(folder / "mutual", first, ssl_ca_certs=str(clients_ca.certificate), ssl_cert_reqs=2)
    yield server
    server.stop()


def trust(server: Pair, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=server.certificate)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def health(server: ServerThread, pair: Pair, client: Pair | None = None) -> int:
    return httpx.get(f"{server.url}/health", verify=trust(pair, client), timeout=10).status_code


def generate(server: ServerThread, pair: Pair, client: Pair | None = None) -> str:
    own = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(pair.certificate.read_bytes(), *own)
    with grpc.secure_channel(server.server.grpc_address, credentials) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return "".join(
            part.text for part in stub.Generate(inference_pb2.GenerateRequest(prompt="a"), timeout=10)
        )


def test_clients_show_a_certificate_to_both_servers(
    mutual: ServerThread, first: Pair, known: Pair, stranger: Pair
) -> None:
    assert health(mutual, first, known) == 200
    assert generate(mutual, first, known) == DEFAULT_REPLY
    for client in (None, stranger):
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            health(mutual, first, client)
        with pytest.raises(grpc.RpcError) as raised:
            generate(mutual, first, client)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_optional_certificate_is_still_checked(
    folder: Path, first: Pair, clients_ca: Pair, known: Pair, stranger: Pair
) -> None:
    server = serving(folder / "opt", first, ssl_ca_certs=str(clients_ca.certificate), ssl_cert_reqs=1)
    try:
        assert [health(server, first, client) for client in (None, known)] == [200, 200]
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            health(server, first, stranger)
        assert generate(server, first) == DEFAULT_REPLY
    finally:
        server.stop()


def test_the_client_commands_show_one(
    mutual: ServerThread, first: Pair, known: Pair, stranger: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in (
        ["chat", "hello", "--max-tokens", "9", "--url", mutual.url],
        ["jobs", "list", "--grpc", f"grpcs://{mutual.server.grpc_address}"],
    ):
        words = [*where, "--ca-cert", str(first.certificate)]
        assert command.run([*words, "--client-cert", str(known.together)]) == 0
        assert capsys.readouterr().err == ""
        assert command.run(words) == 1
        assert "give yours with --client-cert FILE" in capsys.readouterr().err
        assert command.run([*words, "--client-cert", str(stranger.together)]) == 1
        assert "refuses the one in --client-cert" in capsys.readouterr().err
        assert command.run([*words, "--client-cert", str(known.certificate)]) == 2
        assert "certificate and its key" in capsys.readouterr().err
    assert command.run(["jobs", "list", "--client-cert", str(known.together)]) == 2
    assert "grpcs://" in capsys.readouterr().err


def shown_by(address: tuple[str, int]) -> str:
    return ssl.get_server_certificate(address)


def address_of(text: str) -> tuple[str, int]:
    host, _, port = text.rsplit("/", 1)[-1].rpartition(":")
    return host, int(port)


def test_renewed_files_are_read_again_and_connections_go_on(folder: Path, first: Pair, second: Pair) -> None:
    live = Pair(folder / "live-key.pem", folder / "live-cert.pem")
    first.install(live.key, live.certificate)
    server = serving(folder / "renewed", live, enable_ssl_refresh=True)
    try:
        credentials = grpc.ssl_channel_credentials(first.certificate.read_bytes())
        with (
            httpx.Client(base_url=server.url, verify=trust(first), timeout=10) as http,
            grpc.secure_channel(server.server.grpc_address, credentials) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            server.engine.hold.clear()
            call = stub.Generate(inference_pb2.GenerateRequest(prompt="a"), timeout=20)
            text = next(call).text
            assert http.get("/health").status_code == 200
            renewed = second.certificate.read_text().strip()
            second.install(live.key, live.certificate)
            for place in (server.url, server.server.grpc_address):
                wait_for(lambda place=place: shown_by(address_of(place)).strip() == renewed)
            assert http.get("/health").status_code == 200  # the same connection
            server.engine.hold.set()
            assert text + "".join(part.text for part in call) == DEFAULT_REPLY
        assert health(server, second) == 200 and generate(server, second) == DEFAULT_REPLY
    finally:
        server.stop()


def make(pair: Pair, **settings: object) -> Tls:
    return Tls(
        ServerConfig(
            engine=EngineConfig(model=""),
            ssl_keyfile=str(pair.key),
            ssl_certfile=str(pair.certificate),
            **settings,  # type: ignore[arg-type]
        )
    )


def handshake(tls_context: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """One TLS handshake; raises what the client gets."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)
    failed: list[Exception] = []

    def answer() -> None:
        try:
            with tls_context.wrap_socket(ours, server_side=True) as connection:
                connection.sendall(b"good")
        except OSError as error:
            failed.append(error)
            ours.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname="localhost") as connection:
            if connection.recv(4) != b"good":
                raise ssl.SSLError("refused")
    finally:
        thread.join()


def test_files_that_do_not_fit_together_leave_the_old_ones(
    tmp_path: Path, first: Pair, second: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    live = Pair(tmp_path / "key.pem", tmp_path / "cert.pem")
    first.install(live.key, live.certificate)
    tls = make(live)
    context = tls.http_context
    with caplog.at_level("INFO"):
        tls.look()
        assert caplog.text == ""
        live.certificate.write_bytes(second.certificate.read_bytes())  # its key is still to come
        tls.look()
        tls.look()
        assert caplog.text.count("are not used") == 1 and "--ssl-keyfile" in caplog.text
        handshake(context, trust(first))
        live.key.write_bytes(second.key.read_bytes())
        tls.look()
        assert "read again" in caplog.text
        handshake(context, trust(second))
        live.key.unlink()
        tls.look()
        handshake(context, trust(second))
    with pytest.raises(ssl.SSLError):
        handshake(context, trust(first))


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_ca_that_was_replaced_is_not_trusted_any_more(
    tmp_path: Path, first: Pair, second: Pair, known: Pair, clients_ca: Pair, newest: ssl.TLSVersion
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(clients_ca.certificate.read_bytes())
    tls = make(first, ssl_ca_certs=str(ca), ssl_cert_reqs=2)
    client = trust(first, known)
    client.maximum_version = newest
    handshake(tls.http_context, client)
    ca.write_bytes(second.certificate.read_bytes())
    context = tls.http_context
    tls.look()
    with pytest.raises(OSError):
        handshake(context, client)


def test_files_that_are_none_name_their_flag(tmp_path: Path, first: Pair, second: Pair) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for pair, settings, words in (
        (Pair(second.key, first.certificate), {}, "--ssl-keyfile .* is not the key"),
        (Pair(nothing, nothing), {}, "--ssl-keyfile .* PEM"),
        (Pair(first.key, tmp_path / "gone"), {}, "--ssl-certfile .*gone: can't be read"),
        (first, {"ssl_ca_certs": str(nothing), "ssl_cert_reqs": 2}, "--ssl-ca-certs .*nothing.pem"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(pair, **settings)


def test_a_key_with_a_passphrase_is_refused_without_asking(tmp_path: Path, first: Pair) -> None:
    locked = tmp_path / "locked.pem"
    words = f"openssl pkey -in {first.key} -aes128 -passout pass:secret -out {locked}"
    subprocess.run(words.split(), check=True, capture_output=True)
    with pytest.raises(ConfigError, match="passphrase"):
        make(Pair(locked, first.certificate))
