"""The unit, the compose file and the Kubernetes manifest start the server with what it has."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
import yaml

from coserve.cli.main import app
from tests.deploy.prometheus import DEPLOY, ROOT

KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yml").read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    [found] = [document for document in KUBERNETES if document["kind"] == kind]
    return found


def container() -> dict[str, Any]:
    [only] = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def unit() -> dict[str, list[str]]:
    """Settings of the systemd unit, each key's values in order."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "coserve.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def commands() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    return {
        "systemd": shlex.split(unit()["ExecStart"][0])[1:],
        "compose": compose["services"]["coserve"]["command"],
        "kubernetes": container()["args"],
    }


@pytest.mark.parametrize("where", ["systemd", "compose", "kubernetes"])
def test_it_starts_the_server_with_flags_that_exist(where: str) -> None:
    verb, *rest = commands()[where]
    assert verb == "serve" and "--state-dir" in rest
    known = {flag for p in typer.main.get_command(app).commands["serve"].params for flag in p.opts}
    assert {word for word in rest if word.startswith("--")} <= known


def test_kubernetes_probes_ask_routes_of_ports_that_are_there() -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    paths = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    for probe, path in paths.items():
        assert container()[probe]["httpGet"] == {"path": path, "port": "http"}
    args = container()["args"]
    template = of_kind("Deployment")["spec"]["template"]
    scraped = template["metadata"]["annotations"]["prometheus.io/port"]
    assert args[args.index("--metrics-port") + 1] == scraped == str(ports["metrics"])
    service = {port["name"]: port["port"] for port in of_kind("Service")["spec"]["ports"]}
    assert service == {name: ports[name] for name in service}
    exposed = re.search(r"^EXPOSE (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed and {ports["http"], ports["grpc"]} == {int(port) for port in exposed[1].split()}


def test_whoever_stops_the_server_waits_for_streams_and_checkpoints() -> None:
    needed = 25 + 20  # --shutdown-timeout, and the engine's own
    assert int(unit()["TimeoutStopSec"][0]) > needed
    assert of_kind("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    assert int(compose["services"]["coserve"]["stop_grace_period"].removesuffix("s")) > needed


def test_kubernetes_keeps_one_server_on_its_state() -> None:
    spec = of_kind("Deployment")["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container()["volumeMounts"]}
    user = re.search(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert user and spec["template"]["spec"]["securityContext"]["runAsUser"] == int(user[1])


def test_systemd_does_not_start_a_wrong_setting_again() -> None:
    settings = unit()
    assert settings["Restart"] == ["on-failure"] and settings["RestartPreventExitStatus"] == ["2"]
    assert settings["ExecReload"] == ["/bin/kill -HUP $MAINPID"]  # the keys file's
    assert settings["KillMode"] == ["mixed"]  # the engine checkpoints when the server tells it to
