"""A real Prometheus with the shipped rules scrapes a live server that chats and fine-tunes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from tests.deploy.prometheus import DEPLOY, MISSING, WINDOW, Prometheus, alerts, installed, promtool
from tests.deploy.test_rules import UPSTREAM
from tests.faults.served import Served
from tests.server.running import ServerThread, wait_for

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)
ADAPTER = "watched"
SECONDS = 90.0  # until a wait is given up as failed


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With a target that nobody can meet."""
    state = tmp_path_factory.mktemp("watched") / "state"
    with Served(state, "--slo-tpot-ms", "0.001", "--kv-cache-memory-bytes", "67108864") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    watcher = Prometheus(tmp_path_factory.mktemp("prometheus") / "p", served.url.removeprefix("http://"))
    yield watcher
    watcher.close()


@pytest.fixture(scope="module")
def trained(served: Served, prometheus: Prometheus) -> str:
    """The job that has published the adapter, while Prometheus looked on."""
    job = served.start_job(adapter=ADAPTER, hyperparameters={"n_epochs": 1})
    served.wait_for_status(job, "succeeded")
    return job


def traffic(served: Served) -> None:
    """A chat on the base and one on the adapter, a stream that is left, a refusal, a call over gRPC."""
    served.chat("What is 7 + 5?")
    served.chat("What is 2 + 3?", model=ADAPTER)
    served.http.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
    body = {"prompt": "Count to 50:", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        list(stub.Generate(pb.GenerateRequest(prompt="Hi", sampling_params=pb.SamplingParams(max_tokens=4))))


def until(served: Served, expression: str, prometheus: Prometheus) -> list[dict]:
    """What an expression gives once it gives something, with traffic meanwhile."""

    def ask() -> list[dict]:
        traffic(served)
        return prometheus.query(expression)

    return wait_for(ask, SECONDS)


def expressions() -> list[tuple[str, str]]:
    """(panel, expression) of all panels, with the variables' choices made."""
    chosen = {"job": "coserve", "instance": ".*", "latency_class": ".*", "__rate_interval": WINDOW}
    board = json.loads((DEPLOY / "grafana" / "coserve.json").read_text(encoding="utf-8"))
    return [
        (panel["title"], re.sub(r"\$(\w+)", lambda found: chosen[found[1]], target["expr"]))
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def test_the_target_is_up_and_all_rules_are_loaded_and_healthy(
    served: Served, prometheus: Prometheus
) -> None:
    until_up = lambda: [t for t in prometheus.get("targets")["activeTargets"] if t["health"] == "up"]  # noqa: E731
    [target] = wait_for(until_up, SECONDS)
    assert target["labels"]["job"] == "coserve" and target["lastError"] == ""

    def judged() -> list[dict]:
        [group] = prometheus.get("rules")["groups"]
        return group["rules"] if all(rule["health"] != "unknown" for rule in group["rules"]) else []

    rules = wait_for(judged, SECONDS)
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in alerts()]
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "expression",
    [
        f"sum(rate(vllm:generation_tokens_total[{WINDOW}])) > 0",
        "histogram_quantile(0.99, sum by (le) (vllm:time_to_first_token_seconds_bucket)) > 0",
        'coserve_finetune_jobs{status="succeeded"} == 1',
        'sum(coserve_finetune_tokens_total{kind="trained"}) > 0',
        "max_over_time(coserve_finetune_share[10m]) > 0",
        'vllm:lora_requests_info{running_lora_adapters=~"watched"} > 1e9',
        'coserve_adapter_residency{adapter="watched",tier="device"} == 1',
        'vllm:request_success_total{finished_reason="abort"} > 0',
        'http_requests_total{handler="/v1/completions",status="4xx"} > 0',
        'grpc_server_handled_total{grpc_method="Generate",grpc_code="OK"} > 0',
        "coserve_engine_process_resident_memory_bytes > process_resident_memory_bytes",
        "sum(coserve_engine_memory_bytes) < sum(coserve_memory_limit_bytes)",
    ],
)
def test_what_an_operator_asks_first(served: Served, prometheus: Prometheus, expression: str) -> None:
    assert until(served, expression, prometheus)


@pytest.mark.usefixtures("trained")
def test_every_panel_draws_something_that_is_there(served: Served, prometheus: Prometheus) -> None:
    """But for what hasn't happened: a class without a target of a kind has no line for it."""
    exposed = set(
        re.findall(r"^(?:# TYPE )?([a-zA-Z_:][\w:]*)", served.http.get("/metrics").text, re.MULTILINE)
    )
    for title, expression in expressions():
        named = set(re.findall(r"\b(?:vllm:|coserve_|http_request|grpc_server_|process_)\w+", expression))
        assert named <= exposed, (title, named - exposed)
    empty = {expression for _, expression in expressions()}

    def drawn() -> bool:
        traffic(served)
        empty.difference_update([expression for expression in empty if prometheus.query(expression)])
        return all('kind="ttft"} > 0' in expression for expression in empty)

    wait_for(drawn, SECONDS)
    assert len(empty) == 1


@pytest.mark.usefixtures("trained")
def test_the_variables_of_the_dashboard_have_values(prometheus: Prometheus) -> None:
    for label, metric in (("job", "coserve_engine_up"), ("latency_class", "coserve_class_requests_total")):
        values = prometheus.get(f"label/{label}/values", **{"match[]": metric})
        assert values and "" not in values


@pytest.mark.usefixtures("trained")
def test_gauges_fall_without_traffic(served: Served, prometheus: Prometheus) -> None:
    """vllm#22545, vllm#29928: after the last request was aborted its gauges stood where they were."""
    traffic(served)
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert wait_for(lambda gauge=gauge: prometheus.query(f"{gauge} == 0"), SECONDS)


def test_a_key_that_may_only_watch_is_enough(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nkey = "watch-k"\nrole = "metrics"\n')
    server = ServerThread(tmp_path / "state", keys_file=str(keys))
    watcher = Prometheus(tmp_path / "p", server.url.removeprefix("http://"), "watch-k")
    try:
        assert wait_for(lambda: watcher.query("up == 1"), SECONDS)
        assert httpx.get(f"{server.url}/metrics").status_code == 401
    finally:
        watcher.close()
        server.stop()


@pytest.mark.usefixtures("trained")
def test_promtool_has_nothing_against_a_live_scrape_but_vllms_names(served: Served) -> None:
    traffic(served)
    said = promtool("check", "metrics", input=served.http.get("/metrics").text).stderr.splitlines()
    assert said and [line for line in said if not UPSTREAM.fullmatch(line)] == []


def test_alerts_fire_for_what_is_wrong_and_not_for_the_rest(served: Served, prometheus: Prometheus) -> None:
    until(served, 'ALERTS{alertname="CoserveLatencyTargetMissed",alertstate="firing"}', prometheus)
    for quiet in ("CoserveDown", "CoserveEngineDown", "CoserveServerErrors", "CoserveJobFailed"):
        assert not prometheus.has_fired(quiet), quiet
    served.kill_engine()
    wait_for(lambda: prometheus.has_fired("CoserveEngineDown"), SECONDS)
    wait_for(
        lambda: prometheus.query("coserve_engine_restarts_total == 1 and coserve_engine_up == 1"), SECONDS
    )
    assert not prometheus.has_fired("CoserveDown")
    served.kill()
    wait_for(lambda: prometheus.has_fired("CoserveDown"), SECONDS)
    with pytest.raises(httpx.TransportError):
        served.http.get("/health")
