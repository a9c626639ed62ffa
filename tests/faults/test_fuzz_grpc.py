"""Messages made up by a machine over gRPC: whatever comes, the status is one that the caller's words earn.

Messages are filled at random by their descriptors and then, some of them, damaged byte by byte. `make test`
runs a sample, `make test-all` ten thousand cases (`COSERVE_FUZZ` sets another number).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.server.grpc_gen import adapters_pb2, fine_tuning_pb2, inference_pb2
from tests.server.fake_engine import write_peft
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_adapters_http import load
from tests.server.test_grpc import Stubs

CASES = int(os.environ.get("COSERVE_FUZZ", "10000"))
SAMPLE = 400
METHODS: list[MethodDescriptor] = [
    method
    for module in (adapters_pb2, fine_tuning_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
_EARNED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: st.one_of(
        st.integers(-3, 60), st.sampled_from([-(2**31), 2**31 - 1, 128_000])
    ),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(
        st.integers(-3, 60), st.sampled_from([-(2**63), 2**63 - 1, 2**31])
    ),
}
_WORDS = (
    *(
        "",
        BASE,
        "al",
        "al@1",
        "prod",
        "ftjob-none",
        "FILE",
        "supervised",
        "dpo",
        "user",
        "assistant",
        "exact",
    ),
    *(
        "LORA",
        "q_proj",
        "linear",
        "auto",
        "flex",
        "{}",
        '{"type": "object"}',
        "(",
        "..",
        "a" * 3000,
        "\x00",
        "😀",
    ),
)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, file: str, depth: int = 0) -> Message:
    """A message with some of its fields set."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.integers(0, 2 + depth)) > 1:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            for _ in range(draw(st.integers(0, 2))):
                key = draw(_scalar(entry["key"], file))
                getattr(message, field.name)[key] = draw(_scalar(entry["value"], file))
        elif field.message_type is not None:
            if depth < 3:
                made = [
                    draw(messages(field.message_type, file, depth + 1))
                    for _ in range(draw(st.integers(0, 2)) if field.is_repeated else 1)
                ]
                if field.is_repeated:
                    getattr(message, field.name).extend(made)
                else:
                    getattr(message, field.name).CopyFrom(made[0])
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_scalar(field, file), max_size=3)))
        else:
            setattr(message, field.name, draw(_scalar(field, file)))
    return message


def _scalar(field: FieldDescriptor, file: str) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _INTEGERS:
        return _INTEGERS[kind]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e308]))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=60)
    words = st.sampled_from([file if word == "FILE" else word for word in _WORDS])
    return st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=12))


@st.composite
def wire(draw: st.DrawFn, method: MethodDescriptor, file: str) -> bytes:
    """The bytes of a message, now and then damaged."""
    data = draw(messages(method.input_type, file)).SerializeToString()
    if draw(st.integers(0, 5)) or not data:
        return data
    place = draw(st.integers(0, len(data) - 1))
    return data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 2)) :]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerThread, grpc.Channel, str]]:
    """A server with an adapter, an alias and a file, a channel, and the file's id."""
    root = tmp_path_factory.mktemp("fuzz")
    server = ServerThread(root / "state", adapter_roots=(str(root),))
    with server.http() as http, server.channel() as channel:
        assert load(http, "al", write_peft(root / "al", seed=1)).is_success
        assert http.put("/v1/aliases/prod", json={"model": "al"}).is_success
        yield server, channel, Stubs(channel).upload()
    server.stop()


def check_one(data: st.DataObject, channel: grpc.Channel, file: str) -> None:
    """One made-up call, and what has to hold of its end."""
    method = data.draw(st.sampled_from(METHODS))
    streams = method.client_streaming
    sent = [data.draw(wire(method, file)) for _ in range(data.draw(st.integers(0, 3)) if streams else 1)]
    name = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if streams else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(name)
    metadata = [("x-request-id", data.draw(st.sampled_from(["id", "a b", "x" * 300])))]
    code, said = grpc.StatusCode.OK, ""
    try:
        answer = call(iter(sent) if streams else sent[0], timeout=20, metadata=metadata)
        for _ in answer if method.server_streaming else ():
            pass
    except grpc.RpcError as error:
        code, said = error.code(), error.details()
    assert code in _EARNED, (name, sent, code, said)
    assert code is grpc.StatusCode.OK or said, (name, sent, code)
    assert "Traceback" not in said


_ANY_ORDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
_SETTINGS = settings(deadline=None, suppress_health_check=_ANY_ORDER, database=None)


@settings(_SETTINGS, max_examples=SAMPLE, derandomize=True)
@given(data=st.data())
def test_a_sample(fuzzed: tuple[ServerThread, grpc.Channel, str], data: st.DataObject) -> None:
    check_one(data, fuzzed[1], fuzzed[2])


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(_SETTINGS, max_examples=CASES)
@given(data=st.data())
def test_ten_thousand(fuzzed: tuple[ServerThread, grpc.Channel, str], data: st.DataObject) -> None:
    check_one(data, fuzzed[1], fuzzed[2])


def test_the_server_is_well_after_it(fuzzed: tuple[ServerThread, grpc.Channel, str]) -> None:
    server, channel, _ = fuzzed
    answer = Stubs(channel).inference.Generate(inference_pb2.GenerateRequest(model=BASE, prompt="Hi"))
    assert list(answer)[-1].finish_reason == "stop"
    wait_for(lambda: server.server.context.lifecycle.in_flight == 0)
