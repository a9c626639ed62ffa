"""Every metric that the contract and vLLM's table name, with its type, its labels and its buckets."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from coserve.adapter_metrics import NOT_LOADED, LoadedAdapter
from coserve.engine.messages import EngineReady, EngineStats
from coserve.metrics import Metrics
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from tests.server.running import ServerThread, wait_for

CONTEXT = 4096
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80, 160, 640, 2560),
)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (*(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),)
OURS = ("model_name", "engine")
HISTOGRAMS = {
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_prefill_kv_computed_tokens": TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_num_preemptions": (1, 2, 3, 4, 5, 10, 20),
    "iteration_tokens_total": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": ITL,
    "request_time_per_output_token_seconds": ITL,
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
}
VLLM = {  # name: (type, labels, values of the last label)
    "num_requests_running": ("gauge", OURS, ()),
    "num_requests_waiting": ("gauge", OURS, ()),
    "kv_cache_usage_perc": ("gauge", OURS, ()),
    "num_requests_waiting_by_reason": ("gauge", (*OURS, "reason"), ("capacity", "deferred")),
    "prefix_cache_queries": ("counter", OURS, ()),
    "prefix_cache_hits": ("counter", OURS, ()),
    "num_preemptions": ("counter", OURS, ()),
    "prompt_tokens": ("counter", OURS, ()),
    "prompt_tokens_cached": ("counter", OURS, ()),
    "generation_tokens": ("counter", OURS, ()),
    "prompt_tokens_by_source": ("counter", (*OURS, "source"), ("local_cache_hit", "local_compute")),
    "prompt_tokens_cached_by_source": ("counter", (*OURS, "source"), ("device",)),
    "request_success": (
        "counter",
        (*OURS, "finished_reason"),
        ("abort", "error", "length", "repetition", "stop"),
    ),
    "admission_rejections": ("counter", ("model_name", "reason"), ("max_num_queued_reqs",)),
    **{name: ("histogram", OURS, ()) for name in HISTOGRAMS},
}
CONTRACT = {  # name: (type, labels, values of the last label; None: those that have come up)
    "coserve_finetune_tokens": ("counter", ("kind",), ("backward", "forward", "trained")),
    "coserve_finetune_steps": ("counter", (), ()),
    "coserve_finetune_jobs": (
        "gauge",
        ("status",),
        ("cancelled", "failed", "paused", "queued", "running", "succeeded", "validating_files"),
    ),
    "coserve_finetune_share": ("gauge", (), ()),
    "coserve_step_seconds": ("histogram", ("kind",), None),
    "coserve_step_budget_seconds": ("gauge", (), ()),
    "coserve_step_prediction_error_ratio": ("histogram", (), ()),
    "coserve_memory_bytes": (
        "gauge",
        ("owner",),
        ("activations", "adapters", "free", "kv", "optimizer", "runtime", "weights", "workspace"),
    ),
    "coserve_adapters": ("gauge", ("tier",), ("device", "disk", "host")),
    "coserve_adapter_swaps": ("counter", ("kind",), None),
    "coserve_adapter_found": ("counter", ("tier",), None),
    "coserve_adapter_engine_seconds": ("counter", (), None),
    "coserve_adapter_publish_seconds": ("histogram", (), ()),
    "coserve_slo_target_seconds": ("gauge", ("kind",), ("tpot", "ttft")),
    "coserve_slo_missed": ("counter", ("kind",), ("tpot", "ttft")),
    "coserve_requests_rejected": ("counter", ("reason",), None),
}


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def made() -> Metrics:
    cache = {"block_size": 16, "num_gpu_blocks": 64}
    return Metrics("model", CONTEXT, 4, cache)


def told(metrics: Metrics) -> dict[str, Metric]:
    return families(metrics.render().decode())


@pytest.mark.parametrize("name", VLLM)
def test_vllms_metric(name: str) -> None:
    kind, labels, values = VLLM[name]
    family = told(made())[f"vllm:{name}"]
    assert family.type == kind
    samples = family.samples
    assert samples
    for sample in samples:
        assert set(sample.labels) - {"le"} == set(labels), sample
        assert sample.labels["model_name"] == "model" and sample.labels.get("engine", "0") == "0"
    if values:
        assert sorted(sample.labels[labels[-1]] for sample in samples) == list(values)
    if kind == "histogram":
        bounds = [float(s.labels["le"]) for s in samples if s.name.endswith("_bucket")]
        assert bounds == [*map(float, HISTOGRAMS[name]), math.inf]


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contracts_metric(name: str) -> None:
    kind, labels, values = CONTRACT[name]
    family = told(made())[name]
    assert family.type == kind
    if values is not None:
        plain = [s for s in family.samples if not s.name.endswith(("_bucket", "_sum", "_count"))]
        for sample in plain:
            assert set(sample.labels) == set(labels)
        assert sorted(s.labels[labels[-1]] for s in plain if labels) == list(values)


def test_the_settings_of_the_cache_are_labels_of_a_one() -> None:
    sample = told(made())["vllm:cache_config_info"].samples[0]
    assert sample.value == 1.0
    assert sample.labels == {"block_size": "16", "num_gpu_blocks": "64", "engine": "0"}


def test_prompts_count_by_where_their_tokens_come_from() -> None:
    metrics = made()
    metrics.sample_started(100, 32, 8)
    metrics.sample_started(100, 96, 8)
    metrics.samples_ended(2, 8)
    value = metrics.registry.get_sample_value
    labels = {"model_name": "model", "engine": "0"}
    assert value("vllm:prompt_tokens_total", labels) == 200
    assert value("vllm:prompt_tokens_by_source_total", {**labels, "source": "local_compute"}) == 72
    assert value("vllm:prompt_tokens_by_source_total", {**labels, "source": "local_cache_hit"}) == 128
    assert value("vllm:prompt_tokens_cached_total", labels) == 128
    assert value("vllm:request_params_n_count", labels) == 1
    assert value("vllm:request_max_num_generation_tokens_sum", labels) == 8


def test_a_full_queue_counts_under_vllms_name_too() -> None:
    metrics = made()
    metrics.rejected("queue_full")
    metrics.rejected("model_not_found")
    labels = {"model_name": "model", "reason": "max_num_queued_reqs"}
    assert metrics.registry.get_sample_value("vllm:admission_rejections_total", labels) == 1.0


# ------------------------------------------------------------------ adapters


def info(metrics: Metrics) -> tuple[dict[str, str], float]:
    [sample] = told(metrics)["vllm:lora_requests_info"].samples
    return sample.labels, sample.value


def test_the_gateways_metric_tells_who_is_ready_and_who_is_waited_for() -> None:
    """vllm#45325, llm-d/llm-d-router#2605: an adapter with a request in flight was in both lists, an idle one
    that is loaded in neither, and old sets of labels stayed."""
    metrics, before = made(), time.time()
    loaded = [
        LoadedAdapter("busy", "device", False),
        LoadedAdapter("idle", "device", True),
        LoadedAdapter("cold", "host", False),
    ]
    metrics.adapters(3, loaded)
    metrics.engine_stats(EngineStats(running_adapters={"busy": 2}, waiting_adapters={"far": 3}))
    labels, value = info(metrics)
    assert labels == {
        "max_lora": "4",
        "running_lora_adapters": "busy,idle",
        "waiting_lora_adapters": "far",
    }
    assert before <= value <= time.time()
    metrics.engine_stats(EngineStats())
    labels, value = info(metrics)
    assert labels["running_lora_adapters"] == "busy,idle" and labels["waiting_lora_adapters"] == ""
    metrics.adapters(0, [])
    labels, _ = info(metrics)
    assert labels["running_lora_adapters"] == ""


def test_series_with_an_adapters_name_go_with_the_adapter() -> None:
    metrics = made()
    metrics.adapters(2, [LoadedAdapter("a", "device", True)] * 2)
    waiting = {f"far-{i}": 1 for i in range(500)} | {"a": 1}
    metrics.engine_stats(EngineStats(running_adapters={"a": 3}, waiting_adapters=waiting))
    found = told(metrics)
    [resident] = found["coserve_adapter_residency"].samples
    assert resident.labels == {"adapter": "a", "tier": "device", "pinned": "true"} and resident.value == 2
    counts = {(s.labels["adapter"], s.labels["state"]): s.value for s in requests(found)}
    assert counts == {
        ("a", "running"): 3,
        ("a", "waiting"): 1,
        (NOT_LOADED, "running"): 0,
        (NOT_LOADED, "waiting"): 500,
    }
    metrics.adapters(2, [])
    metrics.engine_stats(EngineStats())
    found = told(metrics)
    assert found["coserve_adapter_residency"].samples == []
    assert {s.labels["adapter"] for s in requests(found)} == {NOT_LOADED}


def requests(found: dict[str, Metric]) -> list:
    return found["coserve_adapter_requests"].samples


# ------------------------------------------------------------------ the engine


def ready(pid: int) -> EngineReady:
    return EngineReady(
        pid=pid,
        model_name="model",
        max_model_len=CONTEXT,
        vocab_size=10,
        num_blocks=64,
        block_size=16,
        device="cpu",
        dtype="float32",
        memory_limit_bytes=12345,
    )


def test_nothing_runs_and_nothing_is_held_while_the_engine_is_away() -> None:
    metrics = made()
    metrics.engine_started(ready(os.getpid()))
    stats = EngineStats(running=3, waiting=2, kv_usage=0.5, memory_bytes={"kv": 7}, resident_bytes=9)
    metrics.engine_stats(stats)
    found = told(metrics)
    assert found["coserve_engine_up"].samples[0].value == 1.0
    [build] = found["coserve_build_info"].samples
    assert build.labels["model_name"] == "model" and build.labels["device"] == "cpu" and build.value == 1.0
    assert found["coserve_memory_limit_bytes"].samples[0].value == 12345
    assert found["coserve_engine_process_resident_memory_bytes"].samples[0].value > 2**20
    metrics.engine_lost()
    found = told(metrics)
    assert "coserve_engine_process_resident_memory_bytes" not in found
    for name in ("coserve_engine_up", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert found[name].samples[0].value == 0.0, name
    assert sum(s.value for s in found["coserve_memory_bytes"].samples) == 0.0
    assert found["coserve_engine_restarts"].samples[0].value == 0.0
    metrics.engine_started(ready(os.getpid()), restarted=True)
    found = told(metrics)
    assert found["coserve_engine_restarts"].samples[0].value == 1.0
    assert found["coserve_engine_up"].samples[0].value == 1.0


# ------------------------------------------------------------------ calls, on a whole server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("keyed")
    server = ServerThread(folder / "state", api_keys=("chat-k",), metrics_port=0)
    yield server
    server.stop()


def scraped(server: ServerThread) -> dict[str, Metric]:
    return families(httpx.get(f"http://127.0.0.1:{server.server.metrics_port}/metrics").text)


def count(server: ServerThread, family: str, **labels: str) -> float:
    samples = scraped(server)[family].samples
    wanted = [s.value for s in samples if s.name.endswith("_total") and labels.items() <= s.labels.items()]
    return sum(wanted)


def test_http_requests_count_by_route_method_and_status(server: ServerThread, http: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert http.post("/v1/chat/completions", json={}).status_code == 400
    assert http.get("/v1/models/no-such-model").status_code == 404
    text = http.get("/metrics").text
    for line in (
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}',
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="4xx"}',
        'http_requests_total{handler="/v1/models/{id:path}",method="GET",status="4xx"}',
        'http_request_duration_seconds_count{handler="/v1/chat/completions",method="POST"}',
    ):
        assert line in text, line
    assert "no-such-model" not in text and 'handler="/metrics"' not in text


def test_hostile_names_make_no_series(keyed: ServerThread) -> None:
    """Paths, methods, models, keys and request ids are the client's; a label never is."""
    with keyed.http("chat-k") as http:
        http.get("/v1/models")
        before = {s for family in scraped(keyed).values() for s in map(series, family.samples)}
        for i in range(30):
            http.get(f"/evil-{i}")
            http.request(("PROPFIND", "MKCOL", "REPORT")[i % 3], "/v1/models")
            http.get(f"/v1/models/evil-{i}%22%0A", headers={"x-request-id": f"evil-{i}"})
            body = {"model": f'evil"{i}', "prompt": "a", "user": f"evil-{i}", "metadata": {"evil": str(i)}}
            http.post("/v1/completions", json=body)
            httpx.get(f"{keyed.url}/v1/models", headers={"authorization": f"Bearer evil-{i}"})
        found = scraped(keyed)
    after = {s for family in found.values() for s in map(series, family.samples)}
    assert not [s for s in after if "evil" in str(s).lower()]
    handlers = {s.labels["handler"] for s in found["http_requests"].samples}
    assert "none" in handlers and {s.labels["method"] for s in found["http_requests"].samples} >= {"other"}
    assert len(after - before) < 120, sorted(after - before)


def test_what_is_refused_before_it_is_a_request_counts_too(keyed: ServerThread) -> None:
    address = urlsplit(keyed.url)
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"x-many: 1\r\n" * 500 + b"\r\n"
    for code, data in (("invalid_http", b"EVIL / HTTP/9\r\n\r\n"), ("headers_too_large", head)):
        before = count(keyed, "coserve_requests_rejected", reason=code)
        with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
            connection.sendall(data)
            assert code in connection.recv(4096).decode()
        assert count(keyed, "coserve_requests_rejected", reason=code) == before + 1


def series(sample) -> tuple:
    return (sample.name, tuple(sorted(sample.labels.items())))


def test_grpc_calls_count_by_method_and_code(keyed: ServerThread) -> None:
    service = {"grpc_service": "coserve.v1.InferenceService", "grpc_method": "Generate"}
    with keyed.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        allowed = (("authorization", "Bearer chat-k"),)
        list(stub.Generate(pb.GenerateRequest(prompt="Hi"), metadata=allowed))
        for metadata, request in (
            ((), pb.GenerateRequest(prompt="Hi")),
            (allowed, pb.GenerateRequest(prompt="Hi", model="nobody")),
        ):
            with pytest.raises(grpc.RpcError):
                list(stub.Generate(request, metadata=metadata))
        keyed.engine.hold.clear()
        try:
            stream = stub.Generate(pb.GenerateRequest(prompt="Hi"), metadata=allowed)
            next(stream)
            stream.cancel()
            wait_for(lambda: count(keyed, "grpc_server_handled", **service, grpc_code="Cancelled") == 1)
        finally:
            keyed.call(set_event(keyed))
        stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=allowed)
    wait_for(lambda: count(keyed, "grpc_server_handled") == 5)
    for code in ("OK", "Unauthenticated", "NotFound", "Cancelled"):
        labels = {**service, "grpc_type": "server_stream", "grpc_code": code}
        assert count(keyed, "grpc_server_handled", **labels) == 1, code
    assert count(keyed, "grpc_server_handled", grpc_method="GetServerInfo", grpc_type="unary") == 1
    assert count(keyed, "grpc_server_started", **service) == 4
    timed = scraped(keyed)["grpc_server_handling_seconds"].samples
    assert sum(s.value for s in timed if s.name.endswith("_count")) == 5


async def set_event(server: ServerThread) -> None:
    server.engine.hold.set()


def test_the_servers_process_and_its_disk_are_measured(http: httpx.Client) -> None:
    found = families(http.get("/metrics").text)
    free, size = (found[f"coserve_disk_{kind}_bytes"].samples[0].value for kind in ("free", "size"))
    assert 0 < free < size
    assert found["process_resident_memory_bytes"].samples[0].value > 2**20
    assert found["process_cpu_seconds"].samples[0].value > 0.0
    assert found["process_open_fds"].samples[0].value > 0
