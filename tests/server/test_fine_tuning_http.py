"""Files and fine-tuning jobs over HTTP, with the official client where it has the call."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import httpx
import openai
import pytest

from coserve.engine.messages import JobMessage
from coserve.server.state_dir import copy_directory
from tests.server.running import BASE, ServerThread, wait_for

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}!"}]}
    for i in range(20)
]
DATA = "\n".join(json.dumps(row) for row in ROWS).encode()


def upload(client: openai.OpenAI, data: bytes = DATA) -> str:
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def until_over(client: openai.OpenAI, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
    def over() -> openai.types.fine_tuning.FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait_for(over)


def test_files(server: ServerThread) -> None:
    client = server.openai()
    file = client.files.create(file=("träin.jsonl", DATA), purpose="fine-tune")
    assert (file.bytes, file.filename, file.purpose) == (len(DATA), "träin.jsonl", "fine-tune")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == DATA
    assert file.id in [found.id for found in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.files.retrieve(file.id)
    assert gone.value.code == "file_not_found"


def test_bad_uploads(http: httpx.Client) -> None:
    part = {"file": ("a.jsonl", b"{}")}
    wrong = http.post("/v1/files", files=part, data={"purpose": "world-domination"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "purpose"
    empty = http.post("/v1/files", files={"file": ("a", b"")}, data={"purpose": "fine-tune"})
    assert empty.status_code == 400 and empty.json()["error"]["param"] == "file"
    none = http.post("/v1/files", files={"other": ("a", b"x")}, data={"purpose": "fine-tune"})
    assert none.status_code == 400 and none.json()["error"]["param"] == "file"
    assert http.post("/v1/files", json={}).status_code == 415
    broken = http.post(
        "/v1/files", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code == 400


def test_a_job_from_file_to_model(server: ServerThread) -> None:
    client = server.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client),
        seed=3,
        suffix="my model",
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
        extra_body={"lora": {"r": 8, "target_modules": ["q_proj"]}, "training": {"learning_rate": 1e-3}},
    )
    assert job.object == "fine_tuning.job" and job.seed == 3 and job.fine_tuned_model is None
    done = until_over(client, job.id)
    assert done.status == "succeeded" and done.trained_tokens == 30 and done.error is None
    assert done.fine_tuned_model == f"ft:{BASE}:coserve:my-model:{job.id.removeprefix('ftjob-')[:8]}"
    assert done.peft["r"] == 8 and done.peft["target_modules"] == ["q_proj"]  # type: ignore[attr-defined]
    assert done.progress["step"] == done.progress["total_steps"] == 3  # type: ignore[attr-defined]
    spec = server.engine.requests
    assert spec == []
    models = {model.id: model for model in client.models.list()}
    assert models[done.fine_tuned_model].parent == BASE  # type: ignore[attr-defined]
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.model == done.fine_tuned_model
    adapter = server.engine.requests[-1].adapter
    assert adapter is not None and adapter.name == done.fine_tuned_model
    (results,) = done.result_files
    table = client.files.content(results).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert table[1:] == ["1,2.0,0.25,3.0,0.125", "2,1.0,0.5,,", "3,0.6666666666666666,0.75,,"]
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}]
        )


def test_a_published_version_shares_its_checkpoint_s_files(server: ServerThread) -> None:
    client = server.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client), extra_body={"adapter": "shared"}
    )
    until_over(client, job.id)
    state = Path(server.config.state_dir)
    version = state / "adapters" / "shared" / "1"
    (checkpoint,) = (state / "jobs" / job.id / "checkpoints").iterdir()
    for file in version.iterdir():
        assert file.samefile(checkpoint / file.name)
    shutil.rmtree(checkpoint)
    assert (version / "adapter_model.safetensors").stat().st_size > 0


def test_where_files_cannot_be_shared_they_are_copied(tmp_path: Path, monkeypatch) -> None:
    def refused(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a").write_bytes(b"abc")
    copy_directory(tmp_path / "from", tmp_path / "to", link=True)
    assert (tmp_path / "to" / "a").read_bytes() == b"abc"
    assert not (tmp_path / "to" / "a").samefile(tmp_path / "from" / "a")


def test_events_and_checkpoints(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client), extra_body={"adapter": "ev"}
    )
    until_over(client, job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert {event.type for event in events} == {"metrics", "message"}
    metrics = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in metrics] == [3, 2, 1]  # type: ignore[index]
    assert all({"step", "total_steps", "train_loss"} <= set(data) for data in metrics)  # type: ignore[arg-type]
    assert all(event.data == {} for event in events if event.type == "message")
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 3 and checkpoint.metrics.train_loss == pytest.approx(2 / 3)
    assert checkpoint.metrics.train_mean_token_accuracy == 0.75 and checkpoint.metrics.valid_loss is None
    assert metrics[-1]["full_valid_loss"] == metrics[-1]["valid_loss"] == 3.0  # type: ignore[index]
    assert metrics[-1]["full_valid_mean_token_accuracy"] == 0.125  # type: ignore[index]
    assert "valid_loss" not in metrics[0]  # type: ignore[operator]
    assert "Step 1/3: training loss=2.0000, validation loss=3.0000" in [event.message for event in events]
    for name in (checkpoint.id, checkpoint.fine_tuned_model_checkpoint):
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
        assert http.post("/v1/chat/completions", json=body).json()["model"] == name
        assert name not in [model.id for model in client.models.list()]


def test_a_job_s_log_counts_what_became_of_its_rows(server: ServerThread) -> None:
    client = server.openai()
    silent = {"messages": [ROWS[0]["messages"][0], {**ROWS[0]["messages"][1], "weight": 0}]}
    long = {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "word " * 60}]}
    data = "\n".join(json.dumps(row) for row in (*ROWS, silent, long)).encode()
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, data),
        extra_body={"adapter": "counted", "training": {"max_length": 40}},
    )
    until_over(client, job.id)
    events = {event.message: event.level for event in client.fine_tuning.jobs.list_events(job.id)}
    (counts,) = [text for text in events if text.startswith("The training file has 21 examples of")]
    assert "of them trained; the longest has 40" in counts
    (cut,) = [text for text in events if "cut at the maximal length (training file" in text]
    (dropped,) = [text for text in events if "dropped (training file): no trained token in them" in text]
    assert cut.startswith("1 example was cut") and dropped.startswith("1 row was")
    assert events[counts] == "info" and events[cut] == events[dropped] == "warn"


def test_a_file_of_another_format_fails_the_job_with_the_reason(server: ServerThread) -> None:
    client = server.openai()
    for data, words in (
        (b"\x1f\x8b\x08" + DATA, "is compressed (gzip)"),
        (b"[" + DATA + b"]", "is one JSON array; write its objects one a line"),
        (b'{"chosen": "a", "rejected": "b"}', "line 1: is a preference row; method supervised takes"),
    ):
        job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, data))
        done = until_over(client, job.id)
        assert done.status == "failed" and done.error is not None
        assert done.error.code == "invalid_training_file" and done.error.param == "training_file"
        assert words in done.error.message


def test_pause_resume_cancel(server: ServerThread) -> None:
    server.engine.auto_train = False
    client = server.openai()
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client))
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    assert cancelled.fine_tuned_model is None
    for action in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError) as over:
            action(job.id)
        assert over.value.code == "failed_precondition"


def test_bad_lines_fail_the_job_by_number(server: ServerThread) -> None:
    client = server.openai()
    lines = DATA.splitlines()
    lines[4] = b'{"messages": 5}'
    lines[16] = b"not json"
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, b"\n".join(lines)))
    failed = until_over(client, job.id)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "invalid_training_file" and failed.error.param == "training_file"
    assert "line 5" in failed.error.message and "line 17" in failed.error.message


def test_idempotency(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    body = {"model": BASE, "training_file": upload(server.openai()), "idempotency_key": "once"}
    first = http.post("/v1/fine_tuning/jobs", json=body)
    again = http.post("/v1/fine_tuning/jobs", json=body)
    assert first.json()["id"] == again.json()["id"]
    other = http.post("/v1/fine_tuning/jobs", json={**body, "seed": 1})
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"


def test_init_from_takes_the_shape(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    file = upload(client)
    first = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"adapter": "base-one"})
    until_over(client, first.id)
    body = {"model": BASE, "training_file": file, "init_from": "base-one@1"}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["peft"]["r"] == 4 and job["peft"]["lora_alpha"] == 8
    as_model = {"model": "base-one", "training_file": file}
    assert http.post("/v1/fine_tuning/jobs", json=as_model).json()["init_from"] == "base-one"
    other = http.post("/v1/fine_tuning/jobs", json={**body, "lora": {"r": 8}})
    assert other.status_code == 400 and other.json()["error"]["param"] == "lora.r"
    same = http.post("/v1/fine_tuning/jobs", json={**body, "lora": {"r": 4, "target_modules": "all-linear"}})
    assert same.json()["peft"]["lora_alpha"] == 8
    assert http.put("/v1/aliases/the-base", json={"model": BASE}).status_code == 200
    aliased = http.post("/v1/fine_tuning/jobs", json={"model": "the-base", "training_file": file})
    assert aliased.status_code == 200 and not aliased.json()["init_from"], aliased.text
    refused = http.post("/v1/fine_tuning/jobs", json={**body, "init_from": "the-base"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "init_from"
    http.delete("/v1/aliases/the-base")
    louder = http.post("/v1/fine_tuning/jobs", json={**body, "lora": {"lora_alpha": 16}})
    assert louder.json()["peft"]["lora_alpha"] == 16 and louder.json()["peft"]["r"] == 4


def test_events_come_in_pages(server: ServerThread, http: httpx.Client) -> None:
    client = server.openai()
    jobs = [client.fine_tuning.jobs.create(model=BASE, training_file=upload(client)).id for _ in range(2)]
    for job in jobs:
        until_over(client, job)
    whole, strange = (
        http.get(f"/v1/fine_tuning/jobs/{job}/events", params={"limit": 100}).json() for job in jobs
    )
    ids = [event["id"] for event in whole["data"]]
    assert ids == sorted(ids, reverse=True) and len(ids) > 6 and not whole["has_more"]
    paged: list[str] = []
    after: dict[str, str] = {}
    while True:
        query = {"limit": "3", **after}
        page = http.get(f"/v1/fine_tuning/jobs/{jobs[0]}/events", params=query).json()
        paged += [event["id"] for event in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], paged[-1])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert paged == ids
    nowhere = ("", "x", "ftevent-", "ftevent-99999999999999999999", "ftevent-²", strange["first_id"])
    for name in nowhere:
        refused = http.get(f"/v1/fine_tuning/jobs/{jobs[0]}/events", params={"after": name})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "after", name


def test_lists_page_and_filter(server: ServerThread) -> None:
    server.engine.auto_train = False
    client = server.openai()
    file = upload(client)
    made = [
        client.fine_tuning.jobs.create(model=BASE, training_file=file, metadata={"n": str(n)}).id
        for n in range(3)
    ]
    page = client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in page.data] == made[:0:-1] and page.has_more
    found = client.fine_tuning.jobs.list(extra_query={"metadata[n]": "1"})
    assert found.data[0].id == made[1]


def test_a_replayed_step_counts_once(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    client = server.openai()
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client)).id
    wait_for(lambda: job in server.engine.jobs)
    for step in (1, 2, 1, 2, 3):
        server.call(server.engine.step(job, step, 9))
    server.call(server.engine.step(job, 2, 9, loss=7.0))
    events = http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
    assert [e["data"]["step"] for e in events if e["type"] == "metrics"] == [3, 2, 1]
    assert [e["level"] for e in events].count("warn") == 1
    assert client.fine_tuning.jobs.retrieve(job).trained_tokens == 30


def test_the_engines_messages_are_in_the_log_once(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    job = server.openai().fine_tuning.jobs.create(model=BASE, training_file=upload(server.openai())).id
    wait_for(lambda: job in server.engine.jobs)
    for text in ("The learning rate is 3.", "The learning rate is 3.", "Step 2: the loss is 99."):
        server.call(server.engine.emit(JobMessage(job_id=job, level="warn", text=text)))
    events = http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
    warned = [(e["type"], e["message"], e["data"]) for e in events if e["level"] == "warn"]
    assert warned == [("message", "Step 2: the loss is 99.", {}), ("message", "The learning rate is 3.", {})]


def test_three_checkpoints_are_kept(server: ServerThread) -> None:
    server.engine.auto_train = False
    client = server.openai()
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client)).id
    wait_for(lambda: job in server.engine.jobs)
    paths = [server.call(server.engine.checkpoint(job, step)) for step in (2, 4, 6, 8)]
    kept = client.fine_tuning.jobs.checkpoints.list(job).data
    assert [checkpoint.step_number for checkpoint in kept] == [8, 6, 4]
    assert [path.exists() for path in paths] == [False, True, True, True]
