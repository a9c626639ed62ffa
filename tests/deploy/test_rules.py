"""The alert rules: good by promtool, each tried in both directions, each with a section to read at night."""

from __future__ import annotations

import re

import pytest
import yaml

from coserve.metrics import Metrics
from tests.deploy.prometheus import DEPLOY, MISSING, ROOT, RULES, alerts, installed, promtool

needs_promtool = pytest.mark.skipif(not installed(), reason=MISSING)
TESTS = RULES.with_suffix(".test.yml")
# What promtool holds against names that are vLLM's.
UPSTREAM = re.compile(
    r"vllm:\S+ metric names should not contain ':'"
    r"|vllm:iteration_tokens_total non-counter metrics should not have \"_total\" suffix"
)


def exposition() -> str:
    metrics = Metrics("model", 4096, 4, {"block_size": 16})
    metrics.rejected("queue_full")
    metrics.rpc.http("POST", "/v1/completions", 200, 0.1)
    metrics.rpc.grpc("unary_stream", "/coserve.v1.InferenceService/Generate")("OK")
    return metrics.render().decode()


@needs_promtool
def test_promtool_takes_configuration_and_rules() -> None:
    for command in ("config", "rules"):
        file = RULES if command == "rules" else RULES.with_name("prometheus.yml")
        checked = promtool("check", command, str(file))
        assert checked.returncode == 0 and "SUCCESS" in checked.stdout, checked.stderr


@needs_promtool
def test_promtool_has_nothing_against_the_exposition_but_vllms_names() -> None:
    said = promtool("check", "metrics", input=exposition()).stderr.splitlines()
    assert said and [line for line in said if not UPSTREAM.fullmatch(line)] == []


@needs_promtool
def test_the_rules_own_tests_pass() -> None:
    tried = promtool("test", "rules", TESTS.name, cwd=TESTS.parent)
    assert tried.returncode == 0, tried.stdout + tried.stderr


def test_each_alert_is_tried_when_it_comes_and_when_it_does_not() -> None:
    tried: dict[str, set[bool]] = {}
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tried.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert tried == {rule["alert"]: {True, False} for rule in alerts()}


def test_each_alert_has_a_severity_a_summary_and_a_section() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    sections = {heading.lower() for heading in re.findall(r"^### (\w+)$", text, re.MULTILINE)}
    for rule in alerts():
        notes = rule["annotations"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "{{ $labels.instance }}" in notes["summary"]
        page, _, anchor = notes["runbook_url"].partition("#")
        assert (ROOT / page).is_file() and anchor == rule["alert"].lower() and anchor in sections


def test_alerts_speak_of_metrics_that_are_there() -> None:
    there = set(re.findall(r"^# TYPE (\S+)", exposition(), re.MULTILINE))
    for rule in alerts():
        named = set(re.findall(r"(?:vllm:|coserve_|http_)\w+", rule["expr"]))
        assert named or rule["alert"] == "CoserveDown"
        assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= there, rule["alert"]


def test_what_is_exposed_is_told_of() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    exposed = re.findall(r"^# TYPE ((?:coserve|http|grpc)_\w+)", exposition(), re.MULTILINE)
    apart = "coserve_engine_process_"  # told of with a star
    assert [name for name in exposed if name not in text and not name.startswith(apart)] == []


def test_compose_and_grafana_name_files_that_are_there() -> None:
    services = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(files) == 3 and all((DEPLOY / file).exists() for file in files)
