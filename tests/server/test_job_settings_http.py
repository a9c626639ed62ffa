"""The settings of a job over HTTP: what is refused, what reaches the engine, what is chosen."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest

from coserve.training.dataset import TokenDataset
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_fine_tuning_http import DATA, until_over, upload

REFUSED = [
    ({"training_file": "file-none"}, "training_file", 404),
    ({"training_file": None}, "training_file", 400),
    ({"model": "other"}, "model", 404),
    ({"surprise": 1}, "surprise", 400),
    ({"validation_file": "file-x"}, "validation_file", 404),
    ({"method": {"type": "reinforcement"}}, "method", 400),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "beta", 400),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, "beta", 400),
    ({"training": {"beta": 0.2}}, "training.beta", 400),
    ({"method": "dft", "training": {"label_smoothing": 0.1}}, "training.label_smoothing", 400),
    ({"method": "dpo", "training": {"packing": True}}, "training.packing", 400),
    ({"method": "dpo", "training": {"kl_coef": 0.1}}, "training.kl_coef", 400),
    ({"training": {"label_smoothing": 1}}, "training.label_smoothing", 400),
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


PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": f"Say {i}"}]},
        "preferred_output": [{"role": "assistant", "content": f"{i}!"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    for i in range(16)
]


def test_a_preference_job(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    client = server.openai()
    data = "\n".join(json.dumps(row) for row in PREFERENCES).encode()
    hyperparameters = {"beta": 0.3, "learning_rate_multiplier": "auto", "batch_size": "auto"}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, data),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    assert job.method is not None and job.method.type == "dpo" and job.method.dpo is not None
    wait_for(lambda: job.id in server.engine.jobs)
    spec = server.engine.jobs[job.id]
    assert (spec.method, spec.training.beta, spec.training.batch_size) == ("dpo", 0.3, 2)
    assert spec.training.learning_rate == pytest.approx(1e-5)
    shown = client.fine_tuning.jobs.retrieve(job.id).method
    assert shown is not None and shown.dpo is not None and shown.dpo.hyperparameters is not None
    in_force = shown.dpo.hyperparameters
    assert (in_force.beta, in_force.batch_size, in_force.n_epochs) == (0.3, 2, 3)
    assert TokenDataset.open(spec.data_path).pairs
    wrong = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client), method={"type": "dpo"}
    )
    failed = until_over(client, wrong.id)
    assert failed.error is not None and "dpo" in failed.error.message
    assert failed.error.param == "training_file"


def test_other_objectives(server: ServerThread, http: httpx.Client) -> None:
    server.engine.auto_train = False
    file = upload(server.openai())
    body = {"model": BASE, "training_file": file, "method": "dft", "training": {"kl_coef": 0.2}}
    dft = http.post("/v1/fine_tuning/jobs", json=body).json()
    assert dft["method"]["type"] == "dft"
    body = {"model": BASE, "training_file": file, "training": {"label_smoothing": 0.1}}
    smooth = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    wait_for(lambda: dft["id"] in server.engine.jobs and smooth in server.engine.jobs)
    spec = server.engine.jobs[dft["id"]]
    assert (spec.method, spec.training.kl_coef) == ("dft", 0.2)
    assert server.engine.jobs[smooth].training.label_smoothing == 0.1


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
    said = f"Validating training file: {train} and validation file: {train}"
    assert said in [event["message"] for event in events]

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
