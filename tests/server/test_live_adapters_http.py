"""`JOB:live` as `model`: where the server says so, of a job that has a step; never the base instead."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import openai
import pytest

from coserve.errors import Unavailable
from coserve.server.grpc_gen import inference_pb2 as pb
from coserve.server.grpc_gen.inference_pb2_grpc import InferenceServiceStub
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_fine_tuning_http import until_over, upload

ASK = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    server = ServerThread(tmp_path_factory.mktemp("live") / "s", enable_live_adapters=True)
    yield server
    server.stop()


@pytest.fixture
def job_id(live_server: ServerThread) -> str:
    """A job that the engine has, before its first step."""
    live_server.engine.auto_train = False
    client = live_server.openai()
    job_id = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client)).id
    wait_for(lambda: job_id in live_server.engine.jobs)
    return job_id


def refusal(client: openai.OpenAI, model: str) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model=model, messages=ASK)
    assert refused.value.param == "model"
    return refused.value


def test_a_job_answers_once_it_has_a_step_and_until_it_is_published(
    live_server: ServerThread, job_id: str
) -> None:
    client, engine, model = live_server.openai(), live_server.engine, f"{job_id}:live"
    engine.requests.clear()
    early = refusal(client, model)
    assert early.status_code == 400 and early.code == "adapter_not_live" and "first" in early.message
    assert engine.requests == []
    live_server.call(engine.step(job_id, 1, 3))

    answer = client.chat.completions.create(model=model, messages=ASK)
    assert (answer.model, answer.system_fingerprint) == (model, f"{job_id}:live@3")
    assert (engine.requests[-1].live_job, engine.requests[-1].adapter) == (job_id, None)
    chunks = list(client.chat.completions.create(model=model, messages=ASK, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {f"{job_id}:live@3"}
    assert client.completions.create(model=model, prompt="Hello").system_fingerprint == f"{job_id}:live@3"
    base = client.completions.create(model=BASE, prompt="Hello").system_fingerprint
    assert base is not None and base.startswith("fp_")
    assert model not in [found.id for found in client.models.list()]

    live_server.call(engine.train(job_id, 3))
    done = until_over(client, job_id)
    over = refusal(client, model)
    assert over.status_code == 400 and str(done.fine_tuned_model) in over.message


def test_a_job_that_ended_otherwise_says_so(live_server: ServerThread, job_id: str) -> None:
    client = live_server.openai()
    live_server.call(live_server.engine.step(job_id, 1, 3))
    client.fine_tuning.jobs.cancel(job_id)
    until_over(client, job_id)
    assert "cancelled" in refusal(client, f"{job_id}:live").message


def test_what_the_engine_knows_better_comes_through(live_server: ServerThread, job_id: str) -> None:
    client, engine = live_server.openai(), live_server.engine
    live_server.call(engine.step(job_id, 1, 3))
    engine.refusal = Unavailable("Job is not in training now.", param="model")
    try:
        told = refusal(client, f"{job_id}:live")
        assert told.status_code == 503 and "not in training" in told.message
    finally:
        engine.refusal = None


def test_unknown_jobs_and_other_names_are_not_found(live_server: ServerThread) -> None:
    client = live_server.openai()
    for model in ("ftjob-unknown:live", "something:live", ":live", "ftjob-unknown:live@3"):
        unknown = refusal(client, model)
        assert unknown.status_code == 404 and unknown.code == "model_not_found"
    assert live_server.http().get("/v1/models/ftjob-unknown:live").status_code == 404


def test_a_server_that_was_not_asked_to_says_which_flag(server: ServerThread) -> None:
    refused = refusal(server.openai(), "ftjob-1:live")
    assert refused.status_code == 400 and refused.code == "live_adapters_disabled"
    assert "--enable-live-adapters" in refused.message and server.engine.requests == []


def test_a_job_cannot_start_from_moving_weights(live_server: ServerThread, job_id: str) -> None:
    client = live_server.openai()
    live_server.call(live_server.engine.step(job_id, 1, 3))
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model=BASE, training_file=upload(client), extra_body={"init_from": f"{job_id}:live"}
        )
    assert refused.value.param == "init_from" and "live" in refused.value.message


def test_generate_over_grpc(live_server: ServerThread, job_id: str) -> None:
    with live_server.channel() as channel:
        stub = InferenceServiceStub(channel)
        request = pb.GenerateRequest(model=f"{job_id}:live", prompt="Hello")
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        live_server.call(live_server.engine.step(job_id, 1, 3))
        answers = list(stub.Generate(request))
        assert answers[-1].snapshot == f"{job_id}:live@3"
        assert list(stub.Generate(pb.GenerateRequest(model=BASE, prompt="Hello")))[-1].snapshot == ""
