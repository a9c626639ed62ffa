"""What a gRPC client may send: no size or kind of message or metadata harms the server."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest

from coserve.server.grpc_gen import fine_tuning_pb2 as pbf
from coserve.server.grpc_gen import fine_tuning_pb2_grpc, inference_pb2_grpc
from coserve.server.grpc_gen import inference_pb2 as pbi
from tests.server.running import ServerThread

MIB = 2**20


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    return refusal.value.code()


def answers(channel: grpc.Channel) -> bool:
    return bool(
        inference_pb2_grpc.InferenceServiceStub(channel).GetServerInfo(pbi.GetServerInfoRequest()).version
    )


def test_large_messages(server: ServerThread) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.server.grpc_address, options=options) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        fits = pbf.PreviewDatasetRequest(data=b" " * (31 * MIB))
        assert not stub.PreviewDataset(fits).rows
        over = pbf.PreviewDatasetRequest(data=b" " * (33 * MIB))
        assert code_of(lambda: stub.PreviewDataset(over)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert answers(channel)


def test_large_metadata(server: ServerThread) -> None:
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for metadata in ([("x-large", "v" * 64 * 1024)], [(f"x-{n}", "v" * 20) for n in range(5000)]):
            call = lambda sent=metadata: stub.GetServerInfo(pbi.GetServerInfoRequest(), metadata=sent)  # noqa: E731
            assert code_of(call) in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
        assert answers(channel)


@pytest.mark.parametrize(
    "data", [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0fsentinelprompt", b"\x12\x0esentinel\xff\xfe"]
)
def test_messages_that_are_none(server: ServerThread, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Refused without a word of them in the log."""
    caplog.set_level(logging.DEBUG)
    with server.channel() as channel:
        generate = channel.unary_stream("/coserve.v1.InferenceService/Generate")
        assert code_of(lambda: list(generate(data))) in (
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.INVALID_ARGUMENT,
        )
        assert answers(channel)
    assert "sentinel" not in caplog.text
