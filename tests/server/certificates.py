"""Certificates for tests, made with the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


@dataclass(frozen=True)
class Pair:
    """Files of a key and of its certificate."""

    key: Path
    certificate: Path

    @property
    def together(self) -> Path:
        """One file with both."""
        file = self.key.with_name("together.pem")
        file.write_bytes(self.certificate.read_bytes() + self.key.read_bytes())
        return file

    def install(self, key: Path, certificate: Path) -> None:
        """Copy them over other files, as a renewal does."""
        for source, target in ((self.key, key), (self.certificate, certificate)):
            fresh = target.with_suffix(".new")
            shutil.copy(source, fresh)
            fresh.replace(target)


def self_signed(folder: Path, names: str = "IP:127.0.0.1,DNS:localhost", subject: str = "coserve") -> Pair:
    """A certificate that is its own CA, for these subjectAltNames."""
    folder.mkdir(parents=True)
    pair = Pair(folder / "key.pem", folder / "cert.pem")
    _openssl(
        f"req -x509 {_NEW_KEY} -days 2 -subj /CN={subject} -addext subjectAltName={names} "
        f"-keyout {pair.key} -out {pair.certificate}"
    )
    return pair


def signed_by(authority: Pair, folder: Path, subject: str) -> Pair:
    """A client's certificate that `authority` has signed."""
    folder.mkdir(parents=True)
    pair, request = Pair(folder / "key.pem", folder / "cert.pem"), folder / "request.pem"
    _openssl(f"req {_NEW_KEY} -subj /CN={subject} -keyout {pair.key} -out {request}")
    _openssl(
        f"x509 -req -in {request} -CA {authority.certificate} -CAkey {authority.key} -CAcreateserial "
        f"-days 2 -out {pair.certificate}"
    )
    return pair


def _openssl(words: str) -> None:
    assert shutil.which("openssl"), "these tests make their certificates with the openssl command"
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
