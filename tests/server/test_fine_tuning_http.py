"""Files and fine-tuning jobs over HTTP, with the official client where it has the call."""

from __future__ import annotations

import json

import httpx
import msgspec
import openai
import pytest

from coserve.engine.messages import JobMessage
from coserve.training.dataset import TokenDataset
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
    (cut,) = [text for text in events if "were cut at the maximal length and lost" in text]
    (dropped,) = [text for text in events if "were dropped: no trained token in them" in text]
    assert cut.startswith("1 examples") and dropped.startswith("1 rows")
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


REFUSED = [
    ({"training_file": "file-none"}, "training_file", 404),
    ({"training_file": None}, "training_file", 400),
    ({"model": "other"}, "model", 404),
    ({"surprise": 1}, "surprise", 400),
    ({"validation_file": "file-x"}, "validation_file", 404),
    ({"method": {"type": "dpo"}}, "method", 400),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}},
        "hyperparameters.epochs",
        400,
    ),
    ({"seed": -1}, "seed", 400),
    ({"suffix": "x" * 65}, "suffix", 400),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", 400),
    ({"adapter": "../up"}, "adapter", 400),
    ({"adapter": BASE}, "adapter", 400),
    ({"init_from": "nobody"}, "init_from", 404),
    ({"init_from": BASE}, "init_from", 400),
    ({"lora": {"r": 65}}, "lora.r", 400),
    ({"lora": {"r": 0}}, "lora.r", 400),
    ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha", 400),
    ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout", 400),
    ({"lora": {"target_modules": ["q_proj", "conv9"]}}, "lora.target_modules", 400),
    ({"lora": {"target_modules": ["embed_tokens"]}}, "lora.target_modules", 400),
    ({"lora": {"modules_to_save": ["lm_head"]}}, "lora.modules_to_save", 400),
    ({"lora": {"rank_pattern": {"nowhere": 4}}}, "lora", 400),
    ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights", 400),
    ({"lora": {"init_lora_weights": False}}, "lora.init_lora_weights", 400),
    ({"lora": {"init_lora_weights": ["x"]}}, "lora.init_lora_weights", 400),
    ({"lora": {"exclude_modules": ["nowhere"]}}, "lora", 400),
    ({"lora": {"layers_to_transform": [99]}}, "lora.layers_to_transform", 400),
    ({"lora": {"use_dora": True}}, "lora.use_dora", 400),
    ({"training": {"batch_size": 0}}, "training.batch_size", 400),
    (
        {"training": {"learning_rate": 1, "learning_rate_multiplier": 2}},
        "training.learning_rate_multiplier",
        400,
    ),
    ({"training": {"lr_scheduler_type": "magic"}}, "training.lr_scheduler_type", 400),
    ({"training": {"optimizer": "adagrad"}}, "training.optimizer", 400),
    ({"training": {"momentum": 0.5}}, "training.momentum", 400),
    ({"training": {"optimizer": "sgd", "adam_beta1": 0.5}}, "training.adam_beta1", 400),
    ({"training": {"loraplus_lr_ratio": 0}}, "training.loraplus_lr_ratio", 400),
    ({"training": {"eval_steps": 5}}, "training.eval_steps", 400),
    ({"training": {"early_stopping_patience": 1}}, "training.early_stopping_patience", 400),
    ({"training": {"validation_split": 1.0}}, "training.validation_split", 400),
    (
        {"training": {"validation_split": 0.5, "early_stopping_threshold": 0.1}},
        "training.early_stopping_threshold",
        400,
    ),
    ({"training": {"adam_beta2": 1.0}}, "training.adam_beta2", 400),
    ({"training": {"max_length": 100000}}, "training.max_length", 400),
    ({"training": {"unknown": 1}}, "training.unknown", 400),
    ({"training": {"n_epochs": 2}, "hyperparameters": {"n_epochs": 3}}, "training.n_epochs", 400),
    ({"integrations": [{"type": "wandb"}]}, "integrations", 400),
]


@pytest.mark.parametrize(("fields", "param", "status"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_refused_by_name(
    server: ServerThread, http: httpx.Client, fields: dict, param: str, status: int
) -> None:
    server.engine.auto_train = False
    body = {"model": BASE, "training_file": upload(server.openai()), **fields}
    response = http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] is not None and error["param"].endswith(param), error


def test_defaults(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    body = {"model": BASE, "training_file": upload(server.openai())}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()
    wait_for(lambda: job["id"] in server.engine.jobs)
    spec = server.engine.jobs[job["id"]]
    assert (spec.lora.r, spec.lora.lora_alpha, len(spec.lora.target_modules)) == (16, 32.0, 7)
    training = spec.training
    assert (training.n_epochs, training.batch_size, training.learning_rate) == (3, 8, 2e-4)
    assert (training.warmup_ratio, training.max_grad_norm, training.max_length) == (0.03, 1.0, 256)
    assert http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["progress"]["total_steps"] == 9


def test_the_head_is_adapted_when_it_is_named(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    lora = {"target_modules": ["lm_head", "q_proj"], "rank_pattern": {"lm_head": 4}, "lora_dropout": 0.1}
    body = {"model": BASE, "training_file": upload(server.openai()), "lora": lora}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()
    wait_for(lambda: job["id"] in server.engine.jobs)
    spec = server.engine.jobs[job["id"]].lora
    assert spec.target_modules == ("q_proj", "lm_head") and spec.rank_pattern == {"lm_head": 4}
    shown = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["peft"]
    assert shown["target_modules"] == ["lm_head", "q_proj"] and shown["lora_dropout"] == 0.1


def test_auto_is_chosen_by_the_data_and_reported(server: ServerThread, http: httpx.Client) -> None:
    """Twenty examples: five times through them, in batches of two, at half the default learning rate."""
    server.engine.auto_train = False
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    file = upload(server.openai())
    body = {"model": BASE, "training_file": file, "method": {"type": "supervised"}}
    body["method"]["supervised"] = {"hyperparameters": auto}
    made = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert made["hyperparameters"] == auto
    wait_for(lambda: made["id"] in server.engine.jobs)
    chosen = http.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    expected = {"n_epochs": 5, "batch_size": 2, "learning_rate_multiplier": pytest.approx(0.5)}
    assert chosen["hyperparameters"] == chosen["method"]["supervised"]["hyperparameters"] == expected
    assert chosen["progress"]["total_steps"] == 50
    training = server.engine.jobs[made["id"]].training
    assert (training.n_epochs, training.batch_size, training.learning_rate) == (5, 2, 1e-4)
    messages = [e["message"] for e in http.get(f"/v1/fine_tuning/jobs/{made['id']}/events").json()["data"]]
    assert "Chosen for 20 examples: n_epochs 5, batch_size 2, learning_rate 0.0001" in messages
    both = {"model": BASE, "training_file": file, "training": {"n_epochs": 2, "auto": ["n_epochs"]}}
    refused = http.post("/v1/fine_tuning/jobs", json=both).json()["error"]
    assert refused["param"] == "training.auto" and "n_epochs" in refused["message"]


@pytest.mark.parametrize(("rate", "warned"), [(0.5, True), (0.0, True), (2e-3, False)])
def test_an_absurd_learning_rate_is_warned_of(
    server: ServerThread, http: httpx.Client, rate: float, warned: bool
) -> None:
    body = {"model": BASE, "training_file": upload(server.openai()), "training": {"learning_rate": rate}}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    assert until_over(server.openai(), job).status == "succeeded"
    events = http.get(f"/v1/fine_tuning/jobs/{job}/events", params={"limit": 100}).json()["data"]
    found = [event["message"] for event in events if event["level"] == "warn"]
    assert [f"learning_rate {rate:g}" in text for text in found] == [True] * warned


def test_settings_reach_the_engine_and_are_reported(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    lora = {"r": 4, "lora_dropout": 0.1, "freeze_a": True, "exclude_modules": "q_proj"}
    lora["init_lora_weights"] = "gaussian"
    body = {"model": BASE, "training_file": upload(server.openai()), "lora": lora}
    body["training"] = {"packing": True, "max_length": 128, "batch_size": 2}
    body["training"] |= {"optimizer": "sgd", "momentum": 0.5, "loraplus_lr_ratio": 16}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["peft"]["lora_dropout"] == 0.1 and job["peft"]["r"] == 4
    wait_for(lambda: job["id"] in server.engine.jobs)
    training = server.engine.jobs[job["id"]].training
    assert training.packing and training.optimizer == "sgd"
    assert (training.momentum, training.loraplus_lr_ratio) == (0.5, 16.0)
    packed = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert packed["training"]["packing"] and 3 <= packed["progress"]["total_steps"] < 30
    spec = server.engine.jobs[job["id"]].lora
    assert (spec.lora_dropout, spec.freeze_a, spec.init_lora_weights) == (0.1, True, "gaussian")
    assert job["lora"] == json.loads(msgspec.json.encode(spec))
    assert spec.exclude_modules == ("q_proj",) and job["peft"]["exclude_modules"] == ["q_proj"]


def test_validation_data_of_its_own_and_held_out(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    train, valid = upload(server.openai()), upload(server.openai(), b"\n".join(DATA.splitlines()[:4]))
    settings = {"eval_steps": 2, "early_stopping_patience": 3, "early_stopping_threshold": 0.01}
    body = {"model": BASE, "training_file": train, "validation_file": valid, "training": settings}
    job = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["validation_file"] == valid
    wait_for(lambda: job["id"] in server.engine.jobs)
    spec = server.engine.jobs[job["id"]]
    assert spec.validation_path is not None and len(TokenDataset.open(spec.validation_path)) == 4
    assert len(TokenDataset.open(spec.data_path)) == 20
    assert {name: getattr(spec.training, name) for name in settings} == settings
    refused = http.post(
        "/v1/fine_tuning/jobs", json={**body, "training": {"validation_split": 0.1}}
    ).json()["error"]
    assert refused["param"] == "training.validation_split"

    same = {"model": BASE, "training_file": train, "validation_file": train}
    job = http.post("/v1/fine_tuning/jobs", json=same).json()
    wait_for(lambda: job["id"] in server.engine.jobs)
    events = http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert ["says little" in event["message"] for event in events if event["level"] == "warn"] == [True]

    split = {"model": BASE, "training_file": train, "training": {"validation_split": 0.25}}
    job = http.post("/v1/fine_tuning/jobs", json=split).json()
    wait_for(lambda: job["id"] in server.engine.jobs)
    spec = server.engine.jobs[job["id"]]
    assert spec.validation_path is not None and len(TokenDataset.open(spec.validation_path)) == 5
    assert http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["progress"]["total_steps"] == 6


def test_a_bad_validation_file_is_named(server: ServerThread, http: httpx.Client) -> None:
    train, bad = upload(server.openai()), upload(server.openai(), DATA.splitlines()[0] + b"\nnonsense")
    body = {"model": BASE, "training_file": train, "validation_file": bad}
    failed = until_over(server.openai(), http.post("/v1/fine_tuning/jobs", json=body).json()["id"])
    assert failed.error is not None and failed.error.param == "validation_file"
    assert "line 2" in failed.error.message


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
