"""InferenceService.Generate in all it takes and gives, and what the gRPC server does beside its methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from coserve.errors import QueueFull, RateLimited
from coserve.server.application.generation import Generator
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen import inference_pb2_grpc
from tests.server.fake_engine import DEFAULT_REPLY, EOS, TOKENIZER
from tests.server.running import BASE, ServerThread, wait_for

WEATHER = pb.Tool(name="get_weather", description="", parameters='{"type": "object", "properties": {}}')
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
GENERATE = "/coserve.v1.InferenceService/Generate"


@pytest.fixture
def stub(server: ServerThread) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    with server.channel() as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def health(server: ServerThread) -> Iterator[health_pb2_grpc.HealthStub]:
    with server.channel() as channel:
        yield health_pb2_grpc.HealthStub(channel)


HELLO = pb.ChatMessage(role="user", content="a")
Sampling = pb.SamplingParams
Stub = inference_pb2_grpc.InferenceServiceStub


def ask(stub: Stub, sampling: dict | None = None, **fields: object) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(sampling_params=Sampling(**(sampling or {})), **fields)
    return list(stub.Generate(request, timeout=20))


def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    """(status, the detail's param) of a call that is refused."""
    with pytest.raises(grpc.RpcError) as raised:
        list(call)  # type: ignore[call-overload]
    status = rpc_status.from_call(raised.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    return raised.value.code(), info.metadata["param"]


def test_several_answers_are_told_apart_by_index(stub: Stub, server: ServerThread) -> None:
    parts = ask(stub, {"n": 3, "seed": 7, "max_tokens": 60}, prompt="Hello")
    for index in range(3):
        mine = [part for part in parts if part.index == index]
        assert "".join(part.text for part in mine) == DEFAULT_REPLY
        assert [part.finish_reason for part in mine if part.finish_reason] == ["stop"]
        assert mine[-1].stop_token_id == EOS and not mine[-1].HasField("stop_string")
    tokens = sum(len(part.token_ids) for part in parts)
    last = parts[-1].usage
    assert (last.completion_tokens, last.prompt_tokens) == (tokens, len(TOKENIZER.encode("Hello")))
    assert last.total_tokens == last.completion_tokens + last.prompt_tokens
    assert parts[-1].system_fingerprint and parts[-1].service_tier == "default"
    seeds = [add.sampling.seed for add in server.engine.requests[-3:]]
    assert sorted(seeds) == [7, 8, 9]


def test_the_prompts_ids_and_log_probabilities(stub: Stub) -> None:
    ids = TOKENIZER.encode("One two three")
    parts = ask(
        stub, {"prompt_logprobs": 2, "logprobs": 0, "n": 1}, token_ids=ids, return_prompt_token_ids=True
    )
    first = parts[0]
    assert list(first.prompt_token_ids) == ids
    assert [entry.token_id for entry in first.prompt_logprobs] == ids[1:]
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in first.prompt_logprobs)
    assert not any(part.prompt_logprobs or part.prompt_token_ids for part in parts[1:])


def test_every_sampling_field_reaches_the_engine(stub: Stub, server: ServerThread) -> None:
    sampling = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "seed": 3, "stop_token_ids": [5], "presence_penalty": 0.1, "frequency_penalty": -0.1,
        "repetition_penalty": 1.5,
        "logit_bias": {4: 1.5}, "ignore_eos": True, "allowed_token_ids": [4, 5, 6], "logprobs": 2,
        "logprob_token_ids": [4, 6], "bad_words": ["bad"], "prompt_logprobs": 1,
    }  # fmt: skip
    words = {
        "truncate_prompt_tokens": 3,
        "truncation_side": "right",
        "cache_salt": "salt",
        "stream_interval": 4,
    }
    ids = TOKENIZER.encode("a b c d e f")
    ask(stub, {**sampling, **words}, token_ids=ids, priority=4)
    add = server.engine.requests[-1]
    for name, value in sampling.items():
        if name != "bad_words":
            found = getattr(add.sampling, name)
            assert (list(found) if isinstance(found, tuple) else found) == value, name
    assert add.sampling.bad_words and add.prompt_token_ids == ids[:3]
    assert (add.cache_salt, add.priority) == ("salt", 4)


def test_stops_and_intervals(stub: Stub) -> None:
    parts = ask(stub, {"stop": ["All"], "include_stop_str_in_output": False}, prompt="a")
    assert parts[-1].stop_string == "All" and not parts[-1].HasField("stop_token_id")
    assert "".join(part.text for part in parts) == DEFAULT_REPLY.partition("All")[0]
    tokens = len(TOKENIZER.encode(DEFAULT_REPLY)) + 1
    parts = ask(stub, {"stream_interval": 4}, prompt="a")
    assert len(parts[0].token_ids) == 1 and all(len(part.token_ids) == 4 for part in parts[1:-1])
    assert sum(len(part.token_ids) for part in parts) == tokens


def test_messages_in_parts_with_calls(stub: Stub, server: ServerThread) -> None:
    messages = [
        pb.ChatMessage(role="user", parts=["What is it like", " in Bern?"]),
        pb.ChatMessage(
            role="assistant",
            tool_calls=[pb.ToolCall(id="c1", name="get_weather", arguments='{"city": "Bern"}')],
        ),
        pb.ChatMessage(role="tool", tool_call_id="c1", name="get_weather", content="Sunny."),
    ]
    ask(stub, messages=messages, tools=[WEATHER])
    text = TOKENIZER.decode(server.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert "What is it like" in text and " in Bern?" in text and '"Bern"' in text and "Sunny." in text


def test_tool_calls_come_in_pieces(stub: Stub, server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "reply", CALL)
    messages = [pb.ChatMessage(role="user", content="Weather?")]
    parts = ask(stub, messages=messages, tools=[WEATHER])
    calls = [call for part in parts for call in part.tool_calls]
    assert {call.index for call in calls} == {0}
    assert [call.name for call in calls if call.name] == ["get_weather"]
    assert len([call.id for call in calls if call.id]) == 1
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Bern"}
    assert parts[-1].finish_reason == "tool_calls"
    assert sum(len(part.token_ids) for part in parts) == parts[-1].usage.completion_tokens
    parts = ask(stub, messages=messages)
    assert not any(part.tool_calls for part in parts) and "get_weather" in "".join(
        part.text for part in parts
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "tools": [WEATHER]}, "tools"),
        ({"prompt": "a", "tool_choice": "none"}, "tool_choice"),
        ({"messages": [pb.ChatMessage(role="user", content="a", parts=["b"])]}, "messages[0].parts"),
        ({"messages": [pb.ChatMessage(role="nobody", content="a")]}, "messages[0].role"),
        (
            {"messages": [HELLO], "tools": [pb.Tool(name="f", parameters="{")]},
            "tools[0].parameters",
        ),
        ({"messages": [HELLO], "tool_choice": "auto"}, "tool_choice"),
        ({"messages": [HELLO], "chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"prompt": "a", "request_id": "two words"}, "request_id"),
        ({"prompt": "a", "sampling_params": Sampling(n=1000)}, "sampling_params.n"),
        (
            {"prompt": "a", "sampling_params": Sampling(prompt_logprobs=99)},
            "sampling_params.prompt_logprobs",
        ),
        (
            {"prompt": "a", "sampling_params": Sampling(truncation_side="top")},
            "sampling_params.truncation_side",
        ),
        ({"prompt": "a", "sampling_params": Sampling(bad_words=[" "])}, "sampling_params.bad_words"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(stub: Stub, fields: dict, param: str) -> None:
    assert refusal(stub.Generate(pb.GenerateRequest(**fields))) == (grpc.StatusCode.INVALID_ARGUMENT, param)


def test_a_named_tool_is_demanded(stub: Stub, server: ServerThread) -> None:
    messages = [pb.ChatMessage(role="user", content="Weather?")]
    ask(stub, messages=messages, tools=[WEATHER], tool_choice="get_weather")
    assert server.engine.requests[-1].sampling.grammar
    found = refusal(
        stub.Generate(pb.GenerateRequest(messages=messages, tools=[WEATHER], tool_choice="other"))
    )
    assert found[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_calls_name_comes_back(stub: Stub, server: ServerThread) -> None:
    for metadata, own, wanted in (
        ((("x-request-id", "abc-1"),), "", "abc-1"),
        ((("x-request-id", "abc-2"),), "body", "abc-2"),
        ((), "body-3", "body-3"),
        ((), "", None),
    ):
        call = stub.Generate(pb.GenerateRequest(prompt="a", request_id=own), metadata=metadata)
        said = dict(call.initial_metadata())["x-request-id"]
        list(call)
        assert dict(call.trailing_metadata())["x-request-id"] == said and (wanted is None or said == wanted)
        assert server.engine.requests[-1].request_id.startswith(said)
    call = stub.Generate(pb.GenerateRequest(model="nobody", prompt="a"), metadata=(("x-request-id", "bad"),))
    assert refusal(call)[0] is grpc.StatusCode.NOT_FOUND
    assert dict(call.trailing_metadata())["x-request-id"] == "bad"
    assert "x-request-id" not in dict(call.initial_metadata())  # a status alone: nothing has begun


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RateLimited("slower", retry_after=7.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (QueueFull("full", retry_after=2.0), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_what_passes_says_when_to_come_again(
    stub: Stub,
    server: ServerThread,
    monkeypatch: pytest.MonkeyPatch,
    error: RateLimited,
    code: grpc.StatusCode,
) -> None:
    monkeypatch.setattr(server.engine, "refusal", error)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(pb.GenerateRequest(prompt="a")))
    status, retry = rpc_status.from_call(raised.value), error_details_pb2.RetryInfo()
    assert raised.value.code() is code and status is not None and status.details[1].Unpack(retry)
    assert retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 == pytest.approx(error.retry_after)


def test_a_fault_is_internal_and_tells_nothing(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Generator, "prepare", broken)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(pb.GenerateRequest(prompt="a")))
    assert raised.value.code() is grpc.StatusCode.INTERNAL and "secret" not in raised.value.details()


def test_too_large_a_message_or_head_is_refused(server: ServerThread, stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(pb.GenerateRequest(prompt="a" * (33 * 2**20))))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(pb.GenerateRequest(prompt="a"), metadata=(("long", "x" * 40_000),)))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with server.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        list(channel.unary_stream(GENERATE)(b"\xff\xff\xff"))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ask(stub, prompt="a")[-1].finish_reason == "stop"


def test_health_follows_the_engine(server: ServerThread, health: health_pb2_grpc.HealthStub) -> None:
    async def turn(ready: bool) -> None:
        server.engine.ready = ready

    seen: list[int] = []
    answer = health_pb2.HealthCheckResponse
    watch = health.Watch(health_pb2.HealthCheckRequest(service="coserve.v1.InferenceService"), timeout=20)
    seen.append(next(watch).status)
    for ready in (False, True):
        server.call(turn(ready))
        seen.append(next(watch).status)
        for service in ("", "coserve.v1.FineTuningService", "coserve.v1.AdapterService"):
            wanted = answer.SERVING if ready else answer.NOT_SERVING
            request = health_pb2.HealthCheckRequest(service=service)
            wait_for(lambda request=request, wanted=wanted: health.Check(request).status == wanted)
    assert seen == [answer.SERVING, answer.NOT_SERVING, answer.SERVING]
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="no.such"), timeout=20)
    assert next(unknown).status == answer.SERVICE_UNKNOWN


def test_a_stream_ends_while_the_server_drains(tmp_path: Path) -> None:
    server = ServerThread(tmp_path)
    with server.channel() as channel:
        stub, health = inference_pb2_grpc.InferenceServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        server.engine.hold.clear()
        call = stub.Generate(pb.GenerateRequest(prompt="a"), timeout=20)
        text = next(call).text
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.begin_stop()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as raised:
            ask(stub, model=BASE, prompt="a")
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

        async def go_on() -> None:
            server.engine.hold.set()

        server.call(go_on())
        assert text + "".join(part.text for part in call) == DEFAULT_REPLY
    server.stop()
