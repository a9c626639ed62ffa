"""Debian's Prometheus, unpacked by scripts/setup_clients.sh, with the shipped configuration in a hurry."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.server.running import wait_for

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "coserve.rules.yml"
BIN = ROOT / "build" / "clients" / "prometheus" / "bin"
WINDOW = "10s"
MISSING = "no Prometheus here: scripts/setup_clients.sh unpacks Debian's package"


def installed() -> bool:
    """Whether both programs are there."""
    return (BIN / "promtool").exists() and (BIN / "prometheus").exists()


def promtool(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([BIN / "promtool", *arguments], capture_output=True, text=True, **options)


def alerts() -> list[dict[str, Any]]:
    """The shipped alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


class Prometheus:
    """A server that scrapes `address` many times a second, with a `key` where one is given, and judges by
    windows of seconds."""

    def __init__(self, folder: Path, address: str, key: str = "") -> None:
        folder.mkdir()
        text = re.sub(r"\[\d+m\]", f"[{WINDOW}]", RULES.read_text())
        (folder / RULES.name).write_text(re.sub(r"for: \d+m", "for: 0s", text))
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        if key:
            (folder / "key").write_text(key)
            text = re.sub(r"^    # ( *)(\w+:.*)$", r"    \1\2", text, flags=re.MULTILINE)
            text = re.sub(r"credentials_file: .*", f"credentials_file: {folder / 'key'}", text)
        config = yaml.safe_load(text)
        assert bool(key) == ("authorization" in config["scrape_configs"][0])
        config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [address]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                BIN / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        wait_for(self._is_ready, 60)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "prometheus has ended; see its log"
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """End it."""
        self._http.close()
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def get(self, path: str, **params: str) -> Any:
        """`data` of an answer of its API; an expression that it can't take fails."""
        answer = self._http.get(f"/api/v1/{path}", params=params)
        assert answer.status_code == 200, (params, answer.text)
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now."""
        return self.get("query", query=expression)["result"]

    def has_fired(self, alert: str) -> bool:
        """Whether an alert has fired at some time."""
        select = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
        return bool(self.query(f"max_over_time({select}[10m])"))
