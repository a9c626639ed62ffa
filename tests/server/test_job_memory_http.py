"""A job that can't fit is refused when it is submitted; one that waits says for what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import openai
import pytest

from coserve.engine.messages import JobStatus
from coserve.server.grpc_gen import fine_tuning_pb2, fine_tuning_pb2_grpc
from coserve.training.job import LoraSpec, TrainingSpec
from coserve.training.job_memory import job_memory
from tests.server.fake_engine import MODEL
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_fine_tuning_http import upload

LEFT = 1_000_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    server = ServerThread(tmp_path / "state")
    assert server.engine.info is not None
    server.engine.info = msgspec.structs.replace(server.engine.info, job_memory_bytes=LEFT)
    server.engine.auto_train = False
    yield server
    server.stop()


def test_a_job_too_large_is_refused_with_the_bytes_and_what_to_change(server: ServerThread) -> None:
    client = server.openai()
    file = upload(client)
    need = job_memory(LoraSpec(r=64), TrainingSpec(), MODEL).total
    assert need > LEFT
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"lora": {"r": 64}})
    error = refusal.value
    assert (error.code, error.param) == ("out_of_memory", "lora.r")
    for word in (
        f"need {need} bytes",
        f"there are {LEFT}",
        "lora.r",
        "adamw_8bit",
        "--kv-cache-memory-bytes",
    ):
        assert word in error.message, word
    assert client.fine_tuning.jobs.list().data == []
    small = {"r": 1, "target_modules": ["q_proj"]}
    client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"lora": small})
    with server.channel() as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        request = fine_tuning_pb2.CreateJobRequest(training_file=file, lora=fine_tuning_pb2.LoraConfig(r=64))
        with pytest.raises(grpc.RpcError) as refused:
            stub.CreateJob(request)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_what_a_job_waits_for_is_in_its_status(server: ServerThread) -> None:
    client = server.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client), extra_body={"lora": {"r": 1, "target_modules": ["q_proj"]}}
    )
    wait_for(lambda: job.id in server.engine.jobs)

    def now() -> tuple[str, str | None]:
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found.status, found.status_reason  # type: ignore[attr-defined]

    wait_for(lambda: now() == ("running", None))
    reason = "The job waits for memory: there is none."
    for _ in range(2):
        server.call(server.engine.emit(JobStatus(job_id=job.id, status="queued", message=reason)))
    assert now() == ("queued", reason)
    with server.channel() as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        assert stub.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.id)).status_reason == reason
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert [event.message for event in events].count(reason) == 1
    server.call(server.engine.emit(JobStatus(job_id=job.id, status="running")))
    assert now() == ("running", None)
