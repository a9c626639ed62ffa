"""The client commands against a server with TLS: what is trusted, and what is said of a wrong scheme."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coserve.cli import main as command
from coserve.cli.endpoint import parse_endpoint
from coserve.errors import ConfigError
from tests.server.certificates import self_signed
from tests.server.fake_engine import DEFAULT_REPLY, write_peft
from tests.server.running import ServerThread

Said = Callable[..., tuple[int, str, str]]
Pair = tuple[str, str]  # files of a key and of its certificate
ROW = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1!"}]}


def certificate(folder: Path, names: str) -> Pair:
    """(key, certificate), signed by itself for these subjectAltNames."""
    made = self_signed(folder, names)
    return str(made.key), str(made.certificate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def own_ca(folder: Path) -> Pair:
    return certificate(folder / "right", "IP:127.0.0.1,DNS:localhost")


@pytest.fixture(scope="module")
def secure(folder: Path, own_ca: Pair) -> Iterator[ServerThread]:
    key, certificate = own_ca
    server = ServerThread(folder / "secure", ssl_keyfile=key, ssl_certfile=certificate)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[ServerThread]:
    server = ServerThread(folder / "plain")
    yield server
    server.stop()


def grpc(server: ServerThread) -> str:
    return server.server.grpc_address


def at(server: ServerThread) -> str:
    return server.url.rsplit("/", 1)[1]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command line; (code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = command.run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_finetune_jobs_and_adapters(secure: ServerThread, own_ca: Pair, said: Said, tmp_path: Path) -> None:
    where = ["--grpc", "grpcs://" + grpc(secure), "--ca-cert", own_ca[1]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(ROW)] * 8))
    code, out, err = said("finetune", str(data), "--adapter", "safe", *where)
    assert (code, err) == (0, "") and "step 3/3" in out
    job = out.split()[1].rstrip(":")
    assert said("jobs", "list", *where)[1].splitlines()[1].split()[:2] == [job, "succeeded"]
    assert said("jobs", "get", job, *where)[0] == 0
    assert "step 3/3" in said("jobs", "watch", job, *where)[1]
    assert "ftjob-none" in said("jobs", "cancel", "ftjob-none", *where)[2]
    peft = str(write_peft(tmp_path / "peft"))
    assert said("adapters", "upload", "copy", peft, *where)[:2] == (0, "copy@1 rank 4 ready\n")
    assert said("adapters", "download", "copy", str(tmp_path / "again"), *where)[0] == 0
    assert said("adapters", "unload", "copy", *where)[1] == "copy unloaded\n"
    assert "safe" in said("adapters", "list", *where)[1]


def test_chat(secure: ServerThread, own_ca: Pair, said: Said) -> None:
    answer = said("chat", "hello", "--max-tokens", "99", "--url", secure.url, "--ca-cert", own_ca[1])
    assert answer == (0, DEFAULT_REPLY + "\n", "")


def test_grpc_scheme_is_plaintext_too(plain: ServerThread, said: Said) -> None:
    for scheme in ("", "grpc://", "GRPC://"):
        assert said("jobs", "list", "--grpc", scheme + grpc(plain))[0] == 0


def check_one_line(answer: tuple[int, str, str], code: int, *words: str) -> None:
    assert answer[:2] == (code, "")
    assert answer[2].startswith("coserve: ") and answer[2].count("\n") == 1
    assert [word for word in words if word not in answer[2]] == []


def test_a_scheme_that_is_not_the_server_s_is_refused(
    secure: ServerThread, plain: ServerThread, said
) -> None:
    answer = said("jobs", "list", "--grpc", grpc(secure))
    check_one_line(answer, 2, "speaks TLS", f"--grpc grpcs://{grpc(secure)}")
    answer = said("jobs", "list", "--grpc", "grpcs://" + grpc(plain))
    check_one_line(answer, 2, "no TLS", grpc(plain))
    answer = said("chat", "hello", "--url", f"http://{at(secure)}")
    check_one_line(answer, 2, "speaks TLS", f"--url https://{at(secure)}")
    answer = said("chat", "hello", "--url", f"https://{at(plain)}")
    check_one_line(answer, 2, "no TLS", f"--url http://{at(plain)}")


@pytest.mark.parametrize("other", [False, True])
def test_a_certificate_of_an_unknown_signer(
    secure: ServerThread, said: Said, tmp_path: Path, other: bool
) -> None:
    trusted = ["--ca-cert", certificate(tmp_path / "other", "IP:127.0.0.1")[1]] if other else []
    for flag, address in (("--grpc", "grpcs://" + grpc(secure)), ("--url", secure.url)):
        words = ["jobs", "list"] if flag == "--grpc" else ["chat", "hello"]
        check_one_line(said(*words, flag, address, *trusted), 1, "can't be trusted", "--ca-cert FILE")


def test_a_certificate_for_another_name(folder: Path, said: Said) -> None:
    key, certificate_file = certificate(folder / "elsewhere", "DNS:elsewhere.test")
    server = ServerThread(folder / "misnamed", ssl_keyfile=key, ssl_certfile=certificate_file)
    try:
        trusted = ["--ca-cert", certificate_file]
        answer = said("jobs", "list", "--grpc", "grpcs://" + grpc(server), *trusted)
        check_one_line(answer, 1, "can't be trusted", "127.0.0.1")
        check_one_line(
            said("chat", "hello", "--url", server.url, *trusted), 1, "can't be trusted", "127.0.0.1"
        )
    finally:
        server.stop()


@pytest.mark.parametrize("address", ["grpcs://127.0.0.1:9", "https://127.0.0.1:9"])
def test_nobody_there(said: Said, address: str) -> None:
    words = ["jobs", "list", "--grpc"] if address.startswith("grpc") else ["chat", "hello", "--url"]
    check_one_line(said(*words, address), 1, f"no server answers at {address}")


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--grpc", ""), ("--grpc", "host"), ("--grpc", "grpcs://host"), ("--grpc", "https://host:1"),
        ("--grpc", "host:many"), ("--grpc", "host:70000"), ("--grpc", "grpcs://:1"), ("--grpc", "[::1:5"),
        ("--url", "host:8000"), ("--url", "grpcs://host:1"), ("--url", "https://"), ("--url", "http://host:x"),
    ],
)  # fmt: skip
def test_addresses_that_are_none(flag: str, text: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        parse_endpoint(flag, text, "")


def test_addresses() -> None:
    found = [parse_endpoint("--grpc", text, "") for text in ("h:1", "grpc://h:1/", "grpcs://[::1]:2")]
    assert [(one.target, one.tls) for one in found] == [("h:1", False), ("h:1", False), ("[::1]:2", True)]
    found = [parse_endpoint("--url", text, "") for text in ("http://h", "HTTPS://h/base", "https://h:3")]
    assert [(one.target, one.tls) for one in found] == [("h:80", False), ("h:443", True), ("h:3", True)]


def test_a_ca_that_is_none(said: Said, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    check_one_line(said("jobs", "list", "--ca-cert", str(empty)), 2, "--ca-cert", "grpcs://")
    for flag, scheme, words in (("--grpc", "grpcs", ["jobs", "list"]), ("--url", "https", ["chat", "hello"])):
        where = [*words, flag, f"{scheme}://127.0.0.1:9", "--ca-cert"]
        check_one_line(said(*where, str(empty)), 2, "--ca-cert", "PEM")
        check_one_line(said(*where, str(tmp_path / "none.pem")), 2, "--ca-cert", "no such file")
