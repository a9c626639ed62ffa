"""Latency classes, keys' shares and limits, and refusals that may be retried, on HTTP and gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coserve.config import EngineConfig
from coserve.core.slo import LatencyTargets
from coserve.errors import (
    ConfigError,
    InvalidRequest,
    PermissionDenied,
    QueueFull,
    RateLimited,
    TargetOutOfReach,
)
from coserve.server.auth import Authenticator, Key
from coserve.server.fields import Fields
from coserve.server.grpc_gen import (
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from coserve.server.keys_file import read_keys_file
from coserve.server.quotas import Quotas
from coserve.server.service_tiers import LatencyClass, ServiceTiers
from tests.server.running import BASE, ServerThread, wait_for

KEYS = """
[[classes]]
name = "live"
ttft_ms = 200
tpot_ms = 20
priority = -2

[[classes]]
name = "night"
tpot_ms = 500

[[keys]]
key = "all"

[[keys]]
key = "live-only"
classes = ["live"]
weight = 3

[[keys]]
key = "night-first"
classes = ["night", "default"]

[[keys]]
key = "two"
max_concurrent_requests = 2

[[keys]]
key = "metered"
tokens_per_minute = 60

[[keys]]
key = "tuner"
role = "tune"
weight = 2.5
max_jobs = 2

[[keys]]
key = "ahead"
role = "tune"
min_priority = -3

[[keys]]
key = "boss"
role = "admin"
"""
DEFAULT = LatencyTargets(ttft=1.0, tpot=0.1)
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "keys.toml").write_text(KEYS)
    engine = EngineConfig(model="", slo_ttft_ms=1000.0, slo_tpot_ms=100.0)
    server = ServerThread(folder / "s", keys_file=str(folder / "keys.toml"), engine=engine)
    yield server
    server.stop()


@pytest.fixture
def server(tiered: ServerThread) -> Iterator[ServerThread]:
    tiered.engine.requests.clear()
    yield tiered
    tiered.engine.refusal = None
    tiered.engine.hold.set()


def ask(server: ServerThread, key: str, **how: Any) -> Any:
    return server.openai(key).chat.completions.create(model=BASE, messages=MESSAGES, **how)


# ---------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("key", "tier", "used", "targets", "priority"),
    [
        ("all", None, "default", None, 0),
        ("all", "auto", "default", None, 0),
        ("all", "default", "default", None, 0),
        ("all", "priority", "priority", None, -1),
        ("all", "flex", "flex", LatencyTargets(tpot=0.1), 1),
        ("all", "live", "live", LatencyTargets(ttft=0.2, tpot=0.02), -2),
        ("live-only", None, "live", LatencyTargets(ttft=0.2, tpot=0.02), -2),
        ("night-first", "auto", "night", LatencyTargets(ttft=1.0, tpot=0.5), 0),
        ("night-first", "default", "default", None, 0),
    ],
)
def test_the_class_that_served_is_told_and_reaches_the_engine(
    server: ServerThread, key: str, tier: str | None, used: str, targets: LatencyTargets | None, priority: int
) -> None:
    how = {} if tier is None else {"service_tier": tier}
    assert ask(server, key, **how).service_tier == used
    chunks = list(ask(server, key, stream=True, **how))
    assert {chunk.service_tier for chunk in chunks} == {used}
    for add in server.engine.requests:
        assert (add.targets, add.priority) == (targets, priority)
        assert add.weight == (3.0 if key == "live-only" else 1.0) and len(add.tenant) == 16
    with server.http(key) as http:
        body = {"model": BASE, "prompt": "Hi", **how}
        assert http.post("/v1/completions", json=body).json()["service_tier"] == used


def test_a_class_and_a_priority_of_ones_own_add_up(server: ServerThread) -> None:
    ask(server, "all", service_tier="live", extra_body={"priority": 5})
    assert server.engine.requests[0].priority == 3


def test_a_key_asks_for_no_turn_before_its_own(server: ServerThread, tmp_path: Path) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="may not go below 0") as refusal:
        ask(server, "all", extra_body={"priority": -1})
    assert refusal.value.param == "priority"
    with pytest.raises(openai.PermissionDeniedError, match="may not go below -3"):
        ask(server, "ahead", extra_body={"priority": -4})
    assert server.engine.requests == []
    for key, priority in (("all", 0), ("ahead", -3), ("boss", -1000)):
        ask(server, key, extra_body={"priority": priority})
    assert [add.priority for add in server.engine.requests] == [0, -3, -1000]
    with server.http("ahead") as http:
        file = http.post(
            "/v1/files", files={"file": ("a.jsonl", b'{"text": "a b c"}')}, data={"purpose": "fine-tune"}
        ).json()
        body = {"model": BASE, "training_file": file["id"], "priority": -4}
        answer = http.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 403 and answer.json()["error"]["param"] == "priority"
    with server.channel() as channel:
        request = inference_pb2.GenerateRequest(prompt="Hi", priority=-1)
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            request, metadata=[("authorization", "Bearer all")]
        )
        with pytest.raises(grpc.RpcError) as denied:
            list(call)
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "may not go below 0" in denied.value.details()


def test_keys_of_the_flags_have_no_bound_and_a_bad_one_is_named(tmp_path: Path) -> None:
    key = Authenticator.from_config(["plain"], ["boss"]).key("Bearer plain")
    Authenticator.check_priority(key, -(2**31))
    Authenticator.check_priority(None, -(2**31))
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"key": "a", "min_priority": "first"}]}')
    with pytest.raises(ConfigError, match="min_priority must be an integer"):
        read_keys_file(str(path), DEFAULT)


def test_an_unknown_class_is_refused_with_those_there_are(server: ServerThread) -> None:
    with pytest.raises(openai.BadRequestError, match="auto, default, priority, flex, live, night") as refusal:
        ask(server, "all", service_tier="scale")
    assert refusal.value.param == "service_tier"


def test_a_class_that_the_key_may_not_use_is_refused(server: ServerThread) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="it may use live"):
        ask(server, "live-only", service_tier="default")
    assert ask(server, "boss", service_tier="live").service_tier == "live"


def generate(server: ServerThread, key: str, **how: Any) -> list[inference_pb2.GenerateResponse]:
    with server.channel() as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            inference_pb2.GenerateRequest(model=BASE, prompt="Hi", **how),
            metadata=(("authorization", f"Bearer {key}"),),
        )
        return list(call)


def test_classes_over_grpc(server: ServerThread) -> None:
    assert generate(server, "live-only")[-1].service_tier == "live"
    assert generate(server, "all", service_tier="night")[-1].service_tier == "night"
    assert server.engine.requests[-1].targets == LatencyTargets(ttft=1.0, tpot=0.5)
    with pytest.raises(grpc.RpcError) as refusal:
        generate(server, "live-only", service_tier="night")
    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_misses_are_counted_against_the_request_s_class(server: ServerThread) -> None:
    def missed() -> dict[str, float]:
        with server.http("boss") as http:
            lines = http.get("/metrics").text.splitlines()
        found = [line.split() for line in lines if line.startswith("coserve_slo_missed_total")]
        assert 'coserve_slo_target_seconds{kind="ttft"} 1.0' in lines
        return {name.split('"')[1]: float(value) for name, value in found}

    before = missed()
    server.engine.hold.clear()
    stream = ask(server, "all", service_tier="live", stream=True, max_tokens=2)
    next(iter(stream))
    threading.Event().wait(0.06)
    server._loop.call_soon_threadsafe(server.engine.hold.set)
    list(stream)
    assert wait_for(lambda: missed()["tpot"] == before["tpot"] + 1)
    assert missed()["ttft"] == before["ttft"]
    with server.http("boss") as http:
        metrics = http.get("/metrics").text
    assert 'coserve_class_missed_total{kind="tpot",latency_class="live"} 1.0' in metrics
    assert 'coserve_class_requests_total{latency_class="live",outcome="missed"} 1.0' in metrics


# ---------------------------------------------------------------------- refusals


def test_a_target_out_of_reach_is_429_at_once(server: ServerThread) -> None:
    server.engine.refusal = TargetOutOfReach("The first token would come late.", retry_after=3.2)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refusal:
            ask(server, "all", stream=stream)
        error = refusal.value
        assert error.response.headers["retry-after"] == "4"
        assert (error.code, error.type) == ("ttft_target_out_of_reach", "rate_limit_error")
    with server.http("boss") as http:
        metrics = http.get("/metrics").text
    assert 'coserve_requests_rejected_total{reason="ttft_target_out_of_reach"} 2.0' in metrics
    assert 'coserve_class_requests_total{latency_class="default",outcome="refused"} 2.0' in metrics


def test_refusals_over_grpc_say_when_to_come_again(server: ServerThread) -> None:
    server.engine.refusal = TargetOutOfReach("The first token would come late.", retry_after=3.2)
    with pytest.raises(grpc.RpcError) as refusal:
        generate(server, "all")
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in rpc_status.from_call(refusal.value).details:
        for box in (info, retry):
            if detail.Is(box.DESCRIPTOR):
                detail.Unpack(box)
    assert info.reason == "ttft_target_out_of_reach"
    assert retry.retry_delay.ToMilliseconds() == 3200


def test_a_full_queue_is_503(server: ServerThread) -> None:
    server.engine.refusal = QueueFull("Five requests wait already.", retry_after=2.0)
    with pytest.raises(openai.InternalServerError) as refusal:
        ask(server, "all")
    assert refusal.value.status_code == 503 and refusal.value.code == "queue_full"
    assert refusal.value.response.headers["retry-after"] == "2"


def test_a_refused_request_is_none_that_was_served(server: ServerThread) -> None:
    def counts() -> list[str]:
        with server.http("boss") as http:
            lines = http.get("/metrics").text.splitlines()
        return [
            line for line in lines if line.startswith(("vllm:request_success", "vllm:prompt_tokens_total"))
        ]

    before = counts()
    server.engine.refusal = TargetOutOfReach("late", retry_after=1.0)
    with pytest.raises(openai.RateLimitError):
        ask(server, "all")
    assert counts() == before


# ---------------------------------------------------------------------- limits of a key


def test_requests_at_once(server: ServerThread) -> None:
    server.engine.hold.clear()
    streams = [ask(server, "two", stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refusal:
        ask(server, "two")
    headers = refusal.value.response.headers
    assert refusal.value.code == "concurrent_requests_exceeded" and headers["retry-after"] == "1"
    assert headers["x-ratelimit-limit-requests"] == "2" and headers["x-ratelimit-remaining-requests"] == "0"
    server._loop.call_soon_threadsafe(server.engine.hold.set)
    for stream in streams:
        list(stream)

    def left() -> str:
        with server.http("two") as http:
            return http.get("/v1/models").headers["x-ratelimit-remaining-requests"]

    assert wait_for(lambda: left() == "2")
    assert ask(server, "two").choices


def test_a_stream_that_is_left_gives_its_place_back(server: ServerThread) -> None:
    for _ in range(4):
        server.engine.hold.clear()
        stream = ask(server, "two", stream=True)
        next(iter(stream))
        stream.close()
        server._loop.call_soon_threadsafe(server.engine.hold.set)
    quotas, account = server.server.context.quotas, server.server.context.auth.key("Bearer two")
    assert wait_for(lambda: quotas.headers(account)["x-ratelimit-remaining-requests"] == "2")


def test_tokens_a_minute(server: ServerThread) -> None:
    answer = server.openai("metered").chat.completions.with_raw_response.create(
        model=BASE, messages=MESSAGES, max_tokens=40
    )
    left = 60 - answer.parse().usage.total_tokens
    assert answer.headers["x-ratelimit-limit-tokens"] == "60"
    assert left - 2 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= max(0, left) + 2
    with pytest.raises(openai.RateLimitError) as refusal:
        for _ in range(3):
            ask(server, "metered", max_tokens=60)
    assert refusal.value.code == "tokens_per_minute_exceeded"
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 120


def test_jobs_of_a_key(server: ServerThread) -> None:
    server.engine.auto_train = False
    client = server.openai("tuner")
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    file = client.files.create(file=("t.jsonl", row * 12), purpose="fine-tune").id
    made = [client.fine_tuning.jobs.create(model=BASE, training_file=file) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refusal:
        client.fine_tuning.jobs.create(model=BASE, training_file=file)
    assert refusal.value.code == "max_jobs_exceeded" and refusal.value.response.headers["retry-after"] == "60"
    with server.channel() as channel, pytest.raises(grpc.RpcError) as refused:
        fine_tuning_pb2_grpc.FineTuningServiceStub(channel).CreateJob(
            fine_tuning_pb2.CreateJobRequest(model=BASE, training_file=file),
            metadata=(("authorization", "Bearer tuner"),),
        )
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    jobs = server.server.context.config.state_dir
    assert {folder.name for folder in (Path(jobs) / "jobs").iterdir()} == {job.id for job in made}
    assert server.openai("boss").fine_tuning.jobs.create(model=BASE, training_file=file).id
    client.fine_tuning.jobs.cancel(made[0].id)
    assert wait_for(lambda: client.fine_tuning.jobs.retrieve(made[0].id).status == "cancelled")
    last = client.fine_tuning.jobs.create(model=BASE, training_file=file)
    spec = wait_for(lambda: server.engine.jobs.get(last.id))
    assert spec.share == 2.5 and len(spec.tenant) == 16


def test_a_bucket_of_tokens_fills_evenly() -> None:
    now = [0.0]
    quotas, key = Quotas(lambda: now[0]), Key(b"k" * 32, "use", tokens_per_minute=600)
    with quotas.request(key, 500):
        quotas.spend(key, 200)
    with pytest.raises(RateLimited) as refusal, quotas.request(key, 50):
        pass
    assert refusal.value.retry_after == pytest.approx(15.0)
    now[0] = 15.1
    with quotas.request(key, 50):
        assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "1"
    now[0] = 1000.0
    with quotas.request(key, 5000):
        assert quotas.headers(key)["x-ratelimit-remaining-tokens"] == "0"
    assert quotas.headers(None) == {} == quotas.headers(Key(b"n" * 32, "use"))


# ---------------------------------------------------------------------- the file, and what it says


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[classes]]\nname = 'a b'", r"classes\[0\]\.name"),
        ("[[classes]]\nname = 'default'", r"classes\[0\]\.name can't be default"),
        ("[[classes]]\nname = 'a'\nttft_ms = -1", r"classes\[0\]\.ttft_ms must be at least 0"),
        ("[[classes]]\nname = 'a'\ntpot_ms = nan", r"classes\[0\]\.tpot_ms must be a finite number"),
        ("[[classes]]\nname = 'a'\nspeed = 1", r"classes\[0\]\.speed"),
        ("[[classes]]\nname = 'a'\n[[classes]]\nname = 'a'", "twice"),
        ("[[keys]]\nkey = 'k'\nclasses = ['a']", r"keys\[0\]\.classes names 'a'; there are default"),
        ("[[keys]]\nkey = 'k'\nweight = 0", r"keys\[0\]\.weight"),
        ("[[keys]]\nkey = 'k'\nmax_concurrent_requests = 0", r"keys\[0\]\.max_concurrent_requests"),
        ("[[keys]]\nkey = 'k'\nmax_jobs = 1.5", r"keys\[0\]\.max_jobs"),
        ("[[keys]]\nkey = 'k'\ntokens_per_minute = 'many'", r"keys\[0\]\.tokens_per_minute"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text if "[[keys]]" in text else text + "\n[[keys]]\nkey = 'k'\n")
    with pytest.raises(ConfigError, match=f"--keys-file: .*{named}"):
        read_keys_file(str(path), DEFAULT)


def test_tiers_without_a_key() -> None:
    tiers = ServiceTiers(DEFAULT, [LatencyClass("flex", LatencyTargets(tpot=1.0), 7)])
    assert tiers.read(Fields({}), None).latency_class.name == "default"
    assert tiers.read(Fields({"service_tier": "flex"}), None).latency_class.priority == 7
    with pytest.raises(InvalidRequest):
        tiers.read(Fields({"service_tier": 3}), None)
    with pytest.raises(PermissionDenied):
        tiers.read(Fields({"service_tier": "flex"}), Key(b"k" * 32, "use", ("default",)))


def test_targets_that_can_t_be_met_are_named_with_what_could() -> None:
    own = [LatencyClass("fast", LatencyTargets(tpot=1e-3)), LatencyClass("same", LatencyTargets(ttft=2e-3))]
    tiers = ServiceTiers(LatencyTargets(ttft=2e-3, tpot=4e-3), own)
    said = tiers.out_of_reach(LatencyTargets(ttft=20e-3, tpot=3e-3))
    assert len(said) == 2
    assert said[0].startswith("--slo-ttft-ms 2 can't be met") and "so 20 is the least" in said[0]
    assert said[1].startswith("class fast: tpot_ms 1 can't be met") and "takes 2.7 ms" in said[1]
    assert tiers.out_of_reach(LatencyTargets(ttft=1e-3, tpot=0.5e-3)) == []
