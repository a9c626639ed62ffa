"""All RPCs over a real channel: the same application layer as HTTP's, other words."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from coserve.server.grpc_gen import (
    adapters_pb2,
    adapters_pb2_grpc,
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from tests.server.fake_engine import DEFAULT_REPLY, TOKENIZER, write_peft
from tests.server.running import BASE, ServerThread, wait_for

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
    for i in range(12)
]
DATA = "\n".join(json.dumps(row) for row in ROWS).encode()


class Stubs:
    def __init__(self, channel: grpc.Channel) -> None:
        self.tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def upload(self, data: bytes = DATA) -> str:
        info = fine_tuning_pb2.FileInfo(filename="t.jsonl", purpose="fine-tune")
        half = len(data) // 2
        parts = [
            fine_tuning_pb2.UploadFileRequest(info=info),
            fine_tuning_pb2.UploadFileRequest(data=data[:half]),
            fine_tuning_pb2.UploadFileRequest(data=data[half:]),
        ]
        return self.tuning.UploadFile(iter(parts)).id

    def create(self, **fields: object) -> fine_tuning_pb2.Job:
        request = {"model": BASE, "training_file": self.upload(), **fields}
        return self.tuning.CreateJob(fine_tuning_pb2.CreateJobRequest(**request))

    def watch(self, job_id: str, after: str = "") -> list[fine_tuning_pb2.JobEvent]:
        return list(
            self.tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job_id, after=after), timeout=20)
        )


@pytest.fixture
def stubs(server: ServerThread) -> Iterator[Stubs]:
    with server.channel() as channel:
        yield Stubs(channel)


def failure(call: object, *args: object, **kwargs: object) -> tuple[grpc.StatusCode, str, str]:
    """(status, code, param) of a refused call; code and param from its details."""
    with pytest.raises(grpc.RpcError) as raised:
        answer = call(*args, **kwargs)  # type: ignore[operator]
        if hasattr(answer, "__iter__"):
            list(answer)
    status = rpc_status.from_call(raised.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    assert info.reason == info.metadata["code"]
    if raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT:
        violations = error_details_pb2.BadRequest()
        assert status.details[1].Unpack(violations)
        assert violations.field_violations[0].field == info.metadata["param"]
    return raised.value.code(), info.metadata["code"], info.metadata["param"]


def test_generate(stubs: Stubs, server: ServerThread) -> None:
    ids = TOKENIZER.encode("Hello")
    messages = [{"role": "user", "content": "Hello"}]
    forms = (
        ({"prompt": "Hello"}, ids),
        ({"token_ids": ids}, ids),
        ({"messages": messages}, TOKENIZER.encode_chat(messages)),
    )
    for fields, prompt in forms:
        params = inference_pb2.SamplingParams(temperature=0, logprobs=1, max_tokens=60, seed=0, stop=["zzz"])
        request = inference_pb2.GenerateRequest(model=BASE, sampling_params=params, **fields)
        parts = list(stubs.inference.Generate(request))
        assert "".join(part.text for part in parts) == DEFAULT_REPLY
        assert parts[-1].finish_reason == "stop" and not any(part.finish_reason for part in parts[:-1])
        tokens = [token for part in parts for token in part.token_ids]
        assert tokens[:-1] == TOKENIZER.encode(DEFAULT_REPLY)
        assert parts[-1].usage.prompt_tokens == len(prompt)
        assert parts[-1].usage.total_tokens == len(prompt) + len(tokens)
        assert parts[0].logprobs[0].logprob == -0.5 and len(parts[0].logprobs[0].top) == 1
        add = server.engine.requests[-1]
        assert add.prompt_token_ids == prompt and add.sampling.temperature == 0.0 and add.sampling.seed == 0


@pytest.mark.parametrize(
    ("fields", "sampling", "code", "param"),
    [
        ({}, {}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, {}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"token_ids": [10**6]}, {}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (
            {"prompt": "a"},
            {"temperature": 3},
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling_params.temperature",
        ),
        ({"prompt": "a"}, {"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "sampling_params.max_tokens"),
        ({"prompt": "a", "model": "nobody"}, {}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
def test_generate_refusals(
    stubs: Stubs, fields: dict, sampling: dict, code: grpc.StatusCode, param: str
) -> None:
    request = inference_pb2.GenerateRequest(
        sampling_params=inference_pb2.SamplingParams(**sampling), **fields
    )
    found = failure(stubs.inference.Generate, request)
    assert (found[0], found[2]) == (code, param)


def test_cancel_and_deadline_abort(stubs: Stubs, server: ServerThread) -> None:
    server.engine.hold.clear()
    try:
        request = inference_pb2.GenerateRequest(prompt="a")
        call = stubs.inference.Generate(request)
        next(call)
        call.cancel()
        wait_for(lambda: len(server.engine.aborted) == 1)
        with pytest.raises(grpc.RpcError) as late:
            list(stubs.inference.Generate(request, timeout=0.2))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_for(lambda: len(server.engine.aborted) == 2)
    finally:
        server.engine.hold.set()


def test_server_info(stubs: Stubs) -> None:
    info = stubs.inference.GetServerInfo(inference_pb2.GetServerInfoRequest())
    assert (info.model, info.max_model_len, info.ready, info.device) == (BASE, 256, True, "cpu")


def test_job_to_the_end(stubs: Stubs) -> None:
    lora = fine_tuning_pb2.LoraConfig(r=4, lora_alpha=4, use_rslora=False)
    training = fine_tuning_pb2.TrainingConfig(n_epochs=2, warmup_ratio=0, shuffle=False)
    job = stubs.create(adapter="grpc-job", lora=lora, training=training, seed=0, metadata={"k": "v"})
    assert job.id.startswith("ftjob-") and job.status == "validating_files" and job.seed == 0
    assert job.lora.r == 4 and job.lora.lora_alpha == 4 and len(job.lora.target_modules) == 7
    assert job.training.warmup_ratio == 0 and job.training.batch_size == 8 and not job.training.shuffle
    events = stubs.watch(job.id)
    statuses = [event.status for event in events if event.type == "status"]
    assert statuses == ["validating_files", "queued", "running", "succeeded"]
    assert [event.step for event in events if event.type == "metrics"] == [1, 2, 3]
    assert [event.loss for event in events if event.type == "metrics"] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert events[-1].type == "status"
    half = events[len(events) // 2].id
    assert stubs.watch(job.id, half) == events[len(events) // 2 + 1 :]
    assert stubs.watch(job.id, events[-1].id) == []
    done = stubs.tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.id))
    assert done.status == "succeeded" and done.fine_tuned_model == "grpc-job" and done.step == 3
    (checkpoint,) = stubs.tuning.ListCheckpoints(
        fine_tuning_pb2.ListCheckpointsRequest(job_id=job.id)
    ).checkpoints
    assert [event.checkpoint for event in events if event.type == "checkpoint"] == [checkpoint.id]
    version = stubs.adapters.PublishVersion(
        adapters_pb2.PublishVersionRequest(name="again", checkpoint=checkpoint.id)
    )
    assert (version.name, version.version, version.job_id) == ("again", 1, job.id)
    adapter = stubs.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="grpc-job"))
    assert adapter.digest == version.digest and adapter.job_id == job.id and adapter.status == "ready"
    listed = stubs.tuning.ListJobs(fine_tuning_pb2.ListJobsRequest(limit=1))
    assert [found.id for found in listed.jobs] == [job.id]


def test_watch_follows_a_running_job(stubs: Stubs, server: ServerThread) -> None:
    server.engine.auto_train = False
    job = stubs.create()
    wait_for(lambda: job.id in server.engine.jobs)
    seen: list[str] = []
    call = stubs.tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job.id), timeout=20)
    reader = threading.Thread(target=lambda: seen.extend(event.type + event.status for event in call))
    reader.start()
    paused = stubs.tuning.PauseJob(fine_tuning_pb2.PauseJobRequest(job_id=job.id))
    assert paused.status == "paused"
    wait_for(lambda: "statuspaused" in seen)
    assert stubs.tuning.ResumeJob(fine_tuning_pb2.ResumeJobRequest(job_id=job.id)).status == "running"
    server.call(server.engine.step(job.id, 1, 5))
    wait_for(lambda: "metrics" in seen)
    assert stubs.tuning.CancelJob(fine_tuning_pb2.CancelJobRequest(job_id=job.id)).status == "cancelled"
    reader.join(10)
    assert seen[-1] == "statuscancelled"
    found = failure(stubs.tuning.PauseJob, fine_tuning_pb2.PauseJobRequest(job_id=job.id))
    assert found[0] is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"training_file": "file-x"}, grpc.StatusCode.NOT_FOUND, "training_file"),
        ({"training_file": ""}, grpc.StatusCode.INVALID_ARGUMENT, "training_file"),
        ({"method": "ppo"}, grpc.StatusCode.INVALID_ARGUMENT, "method"),
        ({"lora": fine_tuning_pb2.LoraConfig(r=65)}, grpc.StatusCode.INVALID_ARGUMENT, "lora.r"),
        ({"lora": fine_tuning_pb2.LoraConfig(r=0)}, grpc.StatusCode.INVALID_ARGUMENT, "lora.r"),
        (
            {"lora": fine_tuning_pb2.LoraConfig(target_modules=["nope"])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "lora.target_modules",
        ),
        (
            {"training": fine_tuning_pb2.TrainingConfig(n_epochs=0)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "training.n_epochs",
        ),
        (
            {"training": fine_tuning_pb2.TrainingConfig(beta=0.2)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "training.beta",
        ),
    ],
)
def test_create_refusals(stubs: Stubs, fields: dict, code: grpc.StatusCode, param: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stubs.create(**fields)
    assert raised.value.code() is code
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(raised.value)
    assert status is not None and status.details[0].Unpack(info) and info.metadata["param"] == param


def test_unknown_subjects(stubs: Stubs) -> None:
    tuning, adapters = stubs.tuning, stubs.adapters
    for call, request in (
        (tuning.GetJob, fine_tuning_pb2.GetJobRequest(job_id="ftjob-x")),
        (tuning.WatchJob, fine_tuning_pb2.WatchJobRequest(job_id="ftjob-x")),
        (tuning.CancelJob, fine_tuning_pb2.CancelJobRequest(job_id="ftjob-x")),
        (tuning.ListCheckpoints, fine_tuning_pb2.ListCheckpointsRequest(job_id="ftjob-x")),
        (tuning.PreviewDataset, fine_tuning_pb2.PreviewDatasetRequest(file_id="file-x")),
        (adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name="nobody")),
        (adapters.UnloadAdapter, adapters_pb2.UnloadAdapterRequest(name="nobody")),
        (adapters.RollbackAdapter, adapters_pb2.RollbackAdapterRequest(name="nobody")),
        (adapters.DownloadAdapter, adapters_pb2.DownloadAdapterRequest(name="nobody")),
        (adapters.PublishVersion, adapters_pb2.PublishVersionRequest(checkpoint="ftckpt-x")),
    ):
        assert failure(call, request)[0] is grpc.StatusCode.NOT_FOUND


def test_preview(stubs: Stubs) -> None:
    by_data = stubs.tuning.PreviewDataset(fine_tuning_pb2.PreviewDatasetRequest(data=DATA, limit=3))
    request = fine_tuning_pb2.PreviewDatasetRequest(file_id=stubs.upload(), limit=3)
    assert stubs.tuning.PreviewDataset(request) == by_data and len(by_data.rows) == 3
    for number, row in enumerate(by_data.rows):
        assert len(row.token_ids) == len(row.labels)
        trained = [label for label in row.labels if label != -100]
        assert TOKENIZER.decode(trained, skip_special_tokens=False) == f"{number}!<|im_end|>"
        assert all(label in (-100, token) for token, label in zip(row.token_ids, row.labels))
        assert (row.line, row.answer, row.cut_tokens, row.dropped) == (number + 1, "", 0, "")
        assert [(span.text, span.trained) for span in row.spans if span.trained] == [
            (f"{number}!<|im_end|>", True)
        ]
        assert "".join(span.text for span in row.spans) == row.text
    counts = by_data.counts
    assert (counts.rows, counts.examples, by_data.kind) == (3, 3, "chat")
    assert counts.tokens == sum(len(row.token_ids) for row in by_data.rows)
    bad = fine_tuning_pb2.PreviewDatasetRequest(data=DATA + b"\nnot json", limit=100)
    assert failure(stubs.tuning.PreviewDataset, bad)[1] == "invalid_training_file"
    assert failure(stubs.tuning.PreviewDataset, fine_tuning_pb2.PreviewDatasetRequest())[2] == "file_id"


def test_preview_of_other_rows(stubs: Stubs) -> None:
    def of(*rows: object, **training: int) -> fine_tuning_pb2.PreviewDatasetResponse:
        data = "\n".join(json.dumps(row) for row in rows).encode()
        config = fine_tuning_pb2.TrainingConfig(**training)
        return stubs.tuning.PreviewDataset(
            fine_tuning_pb2.PreviewDatasetRequest(data=data, training=config)
        )

    pair = of({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})
    assert [row.answer for row in pair.rows] == ["chosen", "rejected"] and pair.kind == "preference"
    assert [row.spans[-1].text for row in pair.rows] == [" 4<|im_end|>", " 5<|im_end|>"]
    ids = TOKENIZER.encode("What is 7 + 5?", add_special_tokens=False)
    (row,) = of({"token_ids": ids}).rows
    assert row.text == "What is 7 + 5?" and not row.spans[0].trained
    cut = of({"text": "What is 7 + 5?"}, max_length=3)
    assert cut.rows[0].cut_tokens == cut.counts.cut_tokens > 0 and len(cut.rows[0].token_ids) == 3
    dropped = of({"prompt": "What is 7 + 5?", "completion": "12"}, max_length=3)
    assert dropped.rows[0].dropped in dropped.counts.dropped and dropped.counts.examples == 0


def test_upload_order_is_checked(stubs: Stubs) -> None:
    data = fine_tuning_pb2.UploadFileRequest(data=b"x")
    info = fine_tuning_pb2.UploadFileRequest(info=fine_tuning_pb2.FileInfo(filename="f", purpose="fine-tune"))
    for parts in ([data], [], [info, info], [info]):
        assert failure(stubs.tuning.UploadFile, iter(parts))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_adapters(stubs: Stubs, adapter_root: Path) -> None:
    adapters = stubs.adapters
    first = write_peft(adapter_root / "ga", seed=11)
    loaded = adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="ga", path=str(first), pinned=True))
    assert (loaded.name, loaded.version, loaded.rank, loaded.tier) == ("ga", 1, 4, "disk")
    again = failure(adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name="ga", path=str(first)))
    assert again[0] is grpc.StatusCode.FAILED_PRECONDITION
    second = write_peft(adapter_root / "gb", seed=12)
    replaced = adapters.LoadAdapter(
        adapters_pb2.LoadAdapterRequest(name="ga", path=str(second), replace=True)
    )
    assert replaced.version == 2 and replaced.digest != loaded.digest
    assert adapters.RollbackAdapter(adapters_pb2.RollbackAdapterRequest(name="ga")) == loaded
    listed = adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(name="ga")).adapters
    assert sorted(found.version for found in listed) == [1, 2]
    chunks = adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(name="ga", version=2))
    data = b"".join(chunk.data for chunk in chunks)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert "adapter_model.safetensors" in tar.getnames()
    info = adapters_pb2.UploadAdapterRequest(info=adapters_pb2.AdapterInfo(name="gc"))
    uploaded = adapters.UploadAdapter(iter([info, adapters_pb2.UploadAdapterRequest(data=data)]))
    assert uploaded.name == "gc" and uploaded.digest == replaced.digest
    adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="gc"))
    back = adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="gc"))
    assert back == uploaded
    empty = failure(adapters.GetAdapter, adapters_pb2.GetAdapterRequest())
    assert empty[0] is grpc.StatusCode.INVALID_ARGUMENT and empty[2] == "name"


def test_health_and_reflection(server: ServerThread, stubs: Stubs) -> None:
    for service in ("", "coserve.v1.FineTuningService", "coserve.v1.InferenceService"):
        answer = stubs.health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        stubs.health.Check(health_pb2.HealthCheckRequest(service="none"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with server.channel() as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {
        "coserve.v1.FineTuningService",
        "coserve.v1.AdapterService",
        "coserve.v1.InferenceService",
    } <= names
    assert "grpc.health.v1.Health" in names


def test_keys(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "state", api_keys=("chat-k",), admin_api_keys=("admin-k",))
    try:
        with server.channel() as channel:
            stubs = Stubs(channel)
            info = inference_pb2.GetServerInfoRequest()
            jobs = fine_tuning_pb2.ListJobsRequest()
            for metadata in ((), (("authorization", "Bearer no"),), (("authorization", "chat-k"),)):
                for call, request in ((stubs.inference.GetServerInfo, info), (stubs.tuning.ListJobs, jobs)):
                    code, word, _ = failure(call, request, metadata=metadata)
                    assert code is grpc.StatusCode.UNAUTHENTICATED and word == "invalid_api_key"
            chat, admin = (("authorization", "Bearer chat-k"),), (("authorization", "Bearer admin-k"),)
            assert stubs.inference.GetServerInfo(info, metadata=chat).model == BASE
            assert failure(stubs.tuning.ListJobs, jobs, metadata=chat)[0] is grpc.StatusCode.PERMISSION_DENIED
            parts = iter([fine_tuning_pb2.UploadFileRequest(data=b"x")])
            assert (
                failure(stubs.tuning.UploadFile, parts, metadata=chat)[0] is grpc.StatusCode.PERMISSION_DENIED
            )
            assert list(stubs.tuning.ListJobs(jobs, metadata=admin).jobs) == []
            assert stubs.health.Check(health_pb2.HealthCheckRequest()).status == 1
            with pytest.raises(grpc.RpcError) as closed:
                ProtoReflectionDescriptorDatabase(channel).get_services()
            assert closed.value.code() is grpc.StatusCode.UNAUTHENTICATED
    finally:
        server.stop()
