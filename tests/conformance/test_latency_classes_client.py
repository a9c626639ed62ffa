"""OpenAI's client and gRPC's stubs against latency classes: tiers that are echoed, refusals that say when."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from tests.faults.served import Served

QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]


@pytest.mark.parametrize(("asked", "used"), [("auto", "default"), ("flex", "flex"), ("priority", "priority")])
def test_the_tier_that_served_is_in_the_answer(
    client: openai.OpenAI, served: Served, asked: str, used: str
) -> None:
    how = {"model": served.model, "messages": QUESTION, "max_tokens": 3, "service_tier": asked}
    assert client.chat.completions.create(**how).service_tier == used
    assert {chunk.service_tier for chunk in client.chat.completions.create(**how, stream=True)} == {used}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with one place and a target for the first token, whose latency model is warm."""
    state = tmp_path_factory.mktemp("narrow") / "state"
    with Served(state, "--max-num-seqs", "1", "--slo-ttft-ms", "60") as server:
        for number in range(6):
            server.chat(f"What is {number} + 5?", max_tokens=60)
        yield server


def test_a_burst_past_the_target_is_refused_at_once_and_the_rest_is_served(narrow: Served) -> None:
    client = openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(number: int, tier: str = "default") -> openai.RateLimitError | None:
        try:
            client.chat.completions.create(
                model=narrow.model,
                messages=QUESTION,
                max_tokens=300,
                seed=number,
                service_tier=tier,
                extra_body={"ignore_eos": True},
            )
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(ask, range(16)))
        patient = list(pool.map(lambda number: ask(number, "flex"), range(4)))
    refused = [error for error in outcomes if error is not None]
    assert 0 < len(refused) < 16
    for error in refused:
        assert (error.code, error.type) == ("ttft_target_out_of_reach", "rate_limit_error")
        assert int(error.response.headers["retry-after"]) >= 1
    assert patient == [None] * 4, "flex has no target for the first token"
    metrics = narrow.http.get("/metrics").text
    assert f'reason="ttft_target_out_of_reach"}} {len(refused)}.0' in metrics
    assert 'coserve_slo_target_seconds{kind="ttft"} 0.06' in metrics


def test_a_refusal_over_grpc_carries_its_delay(narrow: Served) -> None:
    sampling = inference_pb2.SamplingParams(max_tokens=300, ignore_eos=True)
    with grpc.insecure_channel(narrow.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            model=narrow.model, prompt="Once", sampling_params=sampling, service_tier="flex"
        )
        ahead = [stub.Generate(request) for _ in range(8)]
        next(ahead[0])
        request.service_tier = "default"
        with pytest.raises(grpc.RpcError) as refusal:
            list(stub.Generate(request))
        for call in ahead:
            call.cancel()
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    boxes = [error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()]
    for detail in rpc_status.from_call(refusal.value).details:
        for box in boxes:
            if detail.Is(box.DESCRIPTOR):
                detail.Unpack(box)
    assert boxes[0].retry_delay.ToMilliseconds() >= 1000
    assert boxes[1].reason == "ttft_target_out_of_reach"
