"""What a key doesn't see is not there for it: adapters by the keys' `models`, files and jobs by tenant."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from coserve.server.grpc_gen import adapters_pb2 as pba
from coserve.server.grpc_gen import adapters_pb2_grpc, fine_tuning_pb2_grpc, inference_pb2_grpc
from coserve.server.grpc_gen import fine_tuning_pb2 as pbf
from coserve.server.grpc_gen import inference_pb2 as pbi
from tests.server.fake_engine import write_peft
from tests.server.running import BASE, ServerThread, wait_for

KEYS = f"""
keys = [
  {{ key = "boss", role = "admin" }},
  {{ key = "ann", role = "tune", tenant = "a", models = ["a-*", "{BASE}"] }},
  {{ key = "abe", role = "tune", tenant = "a", models = ["a-*", "{BASE}"] }},
  {{ key = "bob", role = "tune", models = ["b-*", "{BASE}"] }},
  {{ key = "cat", role = "use", models = ["a-?"] }},
  {{ key = "dan", role = "use" }},
]
"""
ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("visible")
    (folder / "keys.toml").write_text(KEYS)
    roots = folder / "roots"
    made = ServerThread(
        folder / "s",
        keys_file=str(folder / "keys.toml"),
        adapter_roots=(str(roots),),
        enable_live_adapters=True,
    )
    with made.http("boss") as http:
        for name in ("a-1", "a-2", "b-1", "c"):
            path = write_peft(roots / name)
            body = {"lora_name": name, "lora_path": str(path)}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    yield made
    made.stop()


def archive(path: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in write_peft(path).iterdir():
            tar.add(file, file.name)
    return packed.getvalue()


def upload(server: ServerThread, key: str) -> str:
    with server.http(key) as http:
        files = {"file": ("rows.jsonl", ROW * 4)}
        return http.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()["id"]


def create(server: ServerThread, key: str, **how: Any) -> httpx.Response:
    with server.http(key) as http:
        return http.post("/v1/fine_tuning/jobs", json={"model": BASE, **how})


# ---------------------------------------------------------------------- models

Ask = Callable[[httpx.Client, str], httpx.Response]
NAMED: dict[str, Ask] = {
    "chat": lambda http, name: http.post("/v1/chat/completions", json={**CHAT, "model": name}),
    "completions": lambda http, name: http.post("/v1/completions", json={"prompt": "Hi", "model": name}),
    "tokenize": lambda http, name: http.post("/tokenize", json={"prompt": "Hi", "model": name}),
    "detokenize": lambda http, name: http.post("/detokenize", json={"tokens": [1], "model": name}),
    "get": lambda http, name: http.get(f"/v1/models/{name}"),
    "get version": lambda http, name: http.get(f"/v1/models/{name}@1"),
    "chat version": lambda http, name: http.post("/v1/chat/completions", json={**CHAT, "model": f"{name}@1"}),
    "delete": lambda http, name: http.delete(f"/v1/models/{name}"),
    "delete version": lambda http, name: http.delete(f"/v1/models/{name}@1"),
    "download": lambda http, name: http.get(f"/v1/adapters/{name}/content"),
    "unload": lambda http, name: http.post("/v1/unload_lora_adapter", json={"lora_name": name}),
    "job": lambda http, name: http.post(
        "/v1/fine_tuning/jobs", json={"model": name, "training_file": "file-none", "adapter": "b-9"}
    ),
    "init_from": lambda http, name: http.post(
        "/v1/fine_tuning/jobs",
        json={"model": BASE, "init_from": name, "training_file": "file-none", "adapter": "b-9"},
    ),
}


@pytest.mark.parametrize("way", list(NAMED))
def test_an_adapter_out_of_sight_is_unknown_on_http(server: ServerThread, way: str) -> None:
    with server.http("bob") as http:
        hidden, unknown = NAMED[way](http, "a-1"), NAMED[way](http, "z-1")
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")
    assert hidden.text == unknown.text.replace("z-1", "a-1")
    with server.http("boss") as http:
        assert http.get("/v1/models/a-1").status_code == 200


def rpc(server: ServerThread, key: str, call: Callable[[grpc.Channel, Any], Any]) -> grpc.RpcError | None:
    with server.channel() as channel:
        try:
            call(channel, [("authorization", f"Bearer {key}")])
        except grpc.RpcError as error:
            return error
    return None


Call = Callable[[grpc.Channel, Any, str], Any]
CALLS: dict[str, Call] = {
    "Generate": lambda channel, meta, name: list(
        inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            pbi.GenerateRequest(model=name, prompt="Hi"), metadata=meta
        )
    ),
    "GetAdapter": lambda channel, meta, name: adapters_pb2_grpc.AdapterServiceStub(channel).GetAdapter(
        pba.GetAdapterRequest(name=name), metadata=meta
    ),
    "ListAdapters": lambda channel, meta, name: adapters_pb2_grpc.AdapterServiceStub(channel).ListAdapters(
        pba.ListAdaptersRequest(name=name), metadata=meta
    ),
    "Unload": lambda channel, meta, name: adapters_pb2_grpc.AdapterServiceStub(channel).UnloadAdapter(
        pba.UnloadAdapterRequest(name=name), metadata=meta
    ),
    "Rollback": lambda channel, meta, name: adapters_pb2_grpc.AdapterServiceStub(channel).RollbackAdapter(
        pba.RollbackAdapterRequest(name=name, version=1), metadata=meta
    ),
    "Download": lambda channel, meta, name: list(
        adapters_pb2_grpc.AdapterServiceStub(channel).DownloadAdapter(
            pba.DownloadAdapterRequest(name=name), metadata=meta
        )
    ),
    "CreateJob": lambda channel, meta, name: fine_tuning_pb2_grpc.FineTuningServiceStub(channel).CreateJob(
        pbf.CreateJobRequest(model=BASE, init_from=name, training_file="f", adapter="b-9"), metadata=meta
    ),
    "PreviewDataset": lambda channel, meta, name: fine_tuning_pb2_grpc.FineTuningServiceStub(
        channel
    ).PreviewDataset(pbf.PreviewDatasetRequest(model=name, data=ROW), metadata=meta),
}


@pytest.mark.parametrize("way", list(CALLS))
def test_an_adapter_out_of_sight_is_unknown_on_grpc(server: ServerThread, way: str) -> None:
    hidden = rpc(server, "bob", lambda channel, meta: CALLS[way](channel, meta, "a-1"))
    unknown = rpc(server, "bob", lambda channel, meta: CALLS[way](channel, meta, "z-1"))
    assert hidden is not None and unknown is not None
    assert hidden.code() is unknown.code() is grpc.StatusCode.NOT_FOUND
    assert hidden.details() == unknown.details().replace("z-1", "a-1")


@pytest.mark.parametrize(
    ("key", "seen"),
    [
        ("boss", {BASE, "a-1", "a-2", "b-1", "c"}),
        ("dan", {BASE, "a-1", "a-2", "b-1", "c"}),
        ("ann", {BASE, "a-1", "a-2"}),
        ("bob", {BASE, "b-1"}),
        ("cat", {"a-1", "a-2"}),
    ],
)
def test_lists_hold_what_the_key_sees(server: ServerThread, key: str, seen: set[str]) -> None:
    with server.http(key) as http:
        assert {card["id"] for card in http.get("/v1/models").json()["data"]} == seen
        for name in (BASE, "a-1", "b-1", "c"):
            status = http.post("/v1/chat/completions", json={**CHAT, "model": name}).status_code
            assert status == (200 if name in seen else 404), name
        unnamed = http.post("/v1/chat/completions", json=CHAT).status_code
        assert unnamed == (200 if BASE in seen else 404)
        listed = http.get("/v1/adapters")
        if listed.status_code != 403:
            assert {row["name"] for row in listed.json()["data"]} == seen - {BASE}
        # The metrics name every adapter that runs.
        assert http.get("/metrics").status_code == (200 if key in ("boss", "dan") else 403)


def test_names_that_a_key_may_not_give(server: ServerThread, tmp_path: Path) -> None:
    """403 whether the name is taken or not."""
    file, packed = upload(server, "bob"), archive(tmp_path / "p")
    for name in ("a-1", "a-77"):
        with server.http("bob") as http:
            loaded = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "/x"})
            sent = http.post("/v1/adapters", params={"name": name}, content=packed)
        for answer in (loaded, sent, create(server, "bob", training_file=file, adapter=name)):
            assert answer.status_code == 403 and name in answer.json()["error"]["message"], answer.text
    unnamed = create(server, "bob", training_file=file)
    assert unnamed.status_code == 403 and unnamed.json()["error"]["param"] == "adapter"
    with server.http("bob") as http:
        assert http.post("/v1/adapters", params={"name": "b-2"}, content=packed).status_code == 200
        assert http.delete("/v1/models/b-2").status_code == 200


def test_an_alias_shows_nothing_that_is_out_of_sight(server: ServerThread) -> None:
    """A key sees an alias when it sees both its name and the model that it means."""
    with server.http("boss") as boss:
        for name, model in (("a-now", "a-1"), ("b-now", "a-1"), ("prod", "a-1")):
            assert boss.put(f"/v1/aliases/{name}", json={"model": model}).status_code == 200
    try:
        for key, seen in (("ann", {"a-now"}), ("bob", set()), ("dan", {"a-now", "b-now", "prod"})):
            with server.http(key) as http:
                assert {row["alias"] for row in http.get("/v1/aliases").json()["data"]} == seen
                assert {card["id"] for card in http.get("/v1/models").json()["data"]} >= seen
                for name in ("a-now", "b-now", "prod"):
                    chat = http.post("/v1/chat/completions", json={**CHAT, "model": name})
                    assert chat.status_code == (200 if name in seen else 404)
                    hidden = http.get(f"/v1/models/{name}")
                    assert hidden.status_code == (200 if name in seen else 404)
                    assert name in seen or "a-1" not in hidden.text + chat.text
        with server.http("bob") as http:
            assert http.put("/v1/aliases/b-mine", json={"model": "a-1"}).status_code == 404
            assert http.put("/v1/aliases/a-now", json={"model": "b-1"}).status_code == 403
            assert http.delete("/v1/aliases/a-now").status_code == 404
            assert http.delete("/v1/models/b-now").status_code == 404
    finally:
        with server.http("boss") as boss:
            for name in ("a-now", "b-now", "prod"):
                boss.delete(f"/v1/aliases/{name}")


# ---------------------------------------------------------------------- files and jobs


@pytest.fixture(scope="module")
def job(server: ServerThread) -> Iterator[dict[str, Any]]:
    """A job of ann's under way, with a checkpoint."""
    server.engine.auto_train = False
    made = create(server, "ann", training_file=upload(server, "ann"), adapter="a-3").json()
    wait_for(lambda: made["id"] in server.engine.jobs)
    server.call(server.engine.step(made["id"], 1, 3))
    server.call(server.engine.checkpoint(made["id"], 1))
    yield made
    server.engine.auto_train = True


ROOT = "/v1/fine_tuning/jobs"
JOB_ROUTES = [
    ("GET", ""),
    ("POST", "/cancel"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("GET", "/events"),
] + [("GET", "/checkpoints")]


@pytest.mark.parametrize(("method", "rest"), JOB_ROUTES)
def test_jobs_of_other_tenants_are_unknown(
    server: ServerThread, job: dict[str, Any], method: str, rest: str
) -> None:
    with server.http("bob") as http:
        hidden = http.request(method, f"{ROOT}/{job['id']}{rest}")
        unknown = http.request(method, f"{ROOT}/ftjob-none{rest}")
    assert hidden.status_code == 404 and hidden.text == unknown.text.replace("ftjob-none", job["id"])
    if method == "GET":
        for key in ("ann", "abe", "boss"):
            with server.http(key) as http:
                assert http.get(f"{ROOT}/{job['id']}{rest}").status_code == 200


def test_lists_hold_the_tenants_own(server: ServerThread, job: dict[str, Any]) -> None:
    file = job["training_file"]
    for key, there in (("ann", True), ("abe", True), ("boss", True), ("bob", False)):
        with server.http(key) as http:
            assert (job["id"] in [found["id"] for found in http.get(ROOT).json()["data"]]) == there
            assert (file in [found["id"] for found in http.get("/v1/files").json()["data"]]) == there
            for path in (f"/v1/files/{file}", f"/v1/files/{file}/content"):
                assert http.get(path).status_code == (200 if there else 404)
    with server.http("bob") as http:
        assert http.delete(f"/v1/files/{file}").status_code == 404
    stolen = create(server, "bob", training_file=file, adapter="b-5")
    assert stolen.status_code == 404 and stolen.json()["error"]["param"] == "training_file"


def test_jobs_and_files_of_other_tenants_on_grpc(server: ServerThread, job: dict[str, Any]) -> None:
    checkpoint = f"ftckpt-{job['id'].removeprefix('ftjob-')}-1"

    def calls(channel: grpc.Channel, meta: Any) -> list[Callable[[], Any]]:
        tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        name = {"job_id": job["id"]}
        return [
            lambda: tuning.GetJob(pbf.GetJobRequest(**name), metadata=meta),
            lambda: tuning.CancelJob(pbf.CancelJobRequest(**name), metadata=meta),
            lambda: tuning.PauseJob(pbf.PauseJobRequest(**name), metadata=meta),
            lambda: tuning.ResumeJob(pbf.ResumeJobRequest(**name), metadata=meta),
            lambda: list(tuning.WatchJob(pbf.WatchJobRequest(**name), metadata=meta)),
            lambda: tuning.ListCheckpoints(pbf.ListCheckpointsRequest(**name), metadata=meta),
            lambda: tuning.PreviewDataset(
                pbf.PreviewDatasetRequest(file_id=job["training_file"]), metadata=meta
            ),
            lambda: adapters.PublishVersion(pba.PublishVersionRequest(**name, name="b-1"), metadata=meta),
            lambda: adapters.PublishVersion(
                pba.PublishVersionRequest(checkpoint=checkpoint, name="b-1"), metadata=meta
            ),
        ]

    with server.channel() as channel:
        for call in calls(channel, [("authorization", "Bearer bob")]):
            with pytest.raises(grpc.RpcError) as refusal:
                call()
            assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        meta = [("authorization", "Bearer bob")]
        tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        listed = tuning.ListJobs(pbf.ListJobsRequest(limit=100), metadata=meta).jobs
        assert job["id"] not in [found.id for found in listed]


def test_checkpoints_and_live_weights_go_by_the_adapters_name(
    server: ServerThread, job: dict[str, Any]
) -> None:
    checkpoint = f"ftckpt-{job['id'].removeprefix('ftjob-')}-1"
    for name in (checkpoint, "a-3:ckpt-step-1", f"{job['id']}:live"):
        for key, status in (("cat", 200), ("ann", 200), ("dan", 200), ("bob", 404)):
            with server.http(key) as http:
                answer = http.post("/v1/chat/completions", json={**CHAT, "model": name})
            assert answer.status_code == status, (key, name, answer.text)
            assert status == 200 or answer.json()["error"]["code"] == "model_not_found"


def test_a_name_out_of_sight_reads_like_one_that_is_not_there(
    server: ServerThread, job: dict[str, Any]
) -> None:
    """Of whatever kind it is, to the letter."""
    checkpoint = f"ftckpt-{job['id'].removeprefix('ftjob-')}-1"
    for key, names in (
        ("bob", (checkpoint, "a-3:ckpt-step-1", f"{job['id']}:live", "c")),
        ("cat", (BASE, "c")),
    ):
        with server.http(key) as http:
            for name in names:
                said = http.post("/v1/completions", json={"prompt": "Hi", "model": name}).json()["error"]
                assert said["message"] == f"The model {name!r} does not exist." and said["param"] == "model"
            unnamed = http.post("/v1/completions", json={"prompt": "Hi"})
            assert unnamed.status_code == (404 if BASE in names else 200)


def test_uploads_in_parts_are_the_tenants_own(server: ServerThread) -> None:
    body = {"bytes": 3, "filename": "f", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    with server.http("ann") as http:
        upload_id = http.post("/v1/uploads", json=body).json()["id"]
    for key, status in (("bob", 404), ("abe", 200)):
        with server.http(key) as http:
            part = http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("x", b"abc")})
            assert part.status_code == status
            names = [part.json().get("id", "part_x")]
            done = http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": names})
            assert done.status_code == status
    with server.http("ann") as http:
        assert http.get(f"/v1/files/{done.json()['file']['id']}").status_code == 200


def test_an_idempotency_key_is_a_tenants_own(server: ServerThread, job: dict[str, Any]) -> None:
    """Two tenants may choose the same key; neither gets the other's job."""
    made = []
    for key, adapter in (("ann", "a-4"), ("bob", "b-4"), ("abe", "a-4")):
        file = job["training_file"] if key != "bob" else upload(server, key)
        answer = create(server, key, training_file=file, adapter=adapter, idempotency_key="once")
        made.append(answer.json()["id"])
    assert made[0] == made[2] != made[1]
