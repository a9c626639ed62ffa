"""Models in training over Tinker's API: what is made of requests, their order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coserve.errors import FailedPrecondition, InternalError, Unavailable
from coserve.server.grpc_gen import tinker_pb2 as pb
from coserve.server.tinker import future_routes, futures
from coserve.training.model_calls import AdamParams, Load, LossSettings, Pass, Save, Update
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.tinker_client import DATUM, LORA, Tinker

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def tinker(server: ServerThread, http) -> Tinker:
    server.engine.calls.clear()
    server.engine.fail_call = None
    return Tinker(http)


def kinds(server: ServerThread) -> list[str]:
    return [type(call).__name__ for _, call in server.engine.calls]


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ({}, (*ATTENTION, *MLP, "lm_head")),
        ({"train_unembed": False}, (*ATTENTION, *MLP)),
        ({"train_mlp": False, "train_unembed": False}, ATTENTION),
        ({"train_attn": False}, (*MLP, "lm_head")),
    ],
)
def test_a_model_is_made_as_its_configuration_says(server, tinker, flags, targets) -> None:
    """SkyRL#1632: train_* are honoured."""
    model_id = tinker.create_model(rank=8, **flags)
    spec = server.engine.models[model_id]
    assert spec.lora.r == 8 and spec.lora.lora_alpha == 32.0 and spec.seed == 7 and spec.method == "calls"
    assert spec.lora.target_modules == targets
    info = tinker.ok("get_info", model_id=model_id)
    assert info["model_data"]["model_name"] == BASE and info["is_lora"] and info["lora_rank"] == 8
    assert info["model_id"] == model_id == f"{tinker.session}:train:0"


def test_a_request_that_comes_twice_is_done_once(server, tinker) -> None:
    body = {"session_id": tinker.session, "model_seq_id": 0, "base_model": BASE, "lora_config": LORA}
    first, again = tinker.ok("create_model", **body), tinker.ok("create_model", **body)
    assert first == again
    tinker.wait(first)
    other = tinker.refused("create_model", **body | {"lora_config": LORA | {"rank": 5}})
    assert other["status"] == 400 and other["param"] == "seq_id"
    step = {"model_id": first["model_id"], "seq_id": 1, "adam_params": {}}
    asked = [tinker.ok("optim_step", **step) for _ in range(3)]
    assert asked[0] == asked[1] == asked[2] and tinker.wait(asked[0]) == tinker.wait(asked[1])
    assert kinds(server) == ["Update"]


def test_calls_are_done_in_the_order_of_their_numbers(server, tinker) -> None:
    model_id = tinker.create_model()
    given = {"data": [DATUM], "loss_fn": "cross_entropy"}
    late = tinker.ok("optim_step", model_id=model_id, seq_id=3, adam_params={"learning_rate": 0.5})
    second = tinker.ok("forward", model_id=model_id, seq_id=2, forward_input=given)
    assert server.engine.calls == []
    first = tinker.ok("forward_backward", model_id=model_id, seq_id=1, forward_backward_input=given)
    for answer in (late, second, first):
        tinker.wait(answer)
    calls = [call for _, call in server.engine.calls]
    assert [type(call) for call in calls] == [Pass, Pass, Update]
    assert calls[0].backward and not calls[1].backward
    assert calls[2] == Update(adam=AdamParams(learning_rate=0.5))


def test_a_refused_call_holds_nobody_up_and_may_be_sent_again_right(server, tinker) -> None:
    model_id = tinker.create_model()
    wrong = {"model_id": model_id, "forward_backward_input": {"data": [DATUM], "loss_fn": "nope"}}
    early = tinker.refused("forward_backward", **wrong, seq_id=2)
    assert early["status"] == 400 and early["param"] == "loss_fn" and "cross_entropy" in early["message"]
    third = tinker.ok("optim_step", model_id=model_id, seq_id=3)
    tinker.refused("forward_backward", **wrong, seq_id=1)
    tinker.wait(third)
    right = {"data": [DATUM], "loss_fn": "cross_entropy"}
    tinker.wait(tinker.ok("forward_backward", model_id=model_id, seq_id=1, forward_backward_input=right))
    assert kinds(server) == ["Update", "Pass"]
    ahead = tinker.refused("optim_step", model_id=model_id, seq_id=100_000)
    assert ahead["status"] == 400 and ahead["param"] == "seq_id"


def test_several_targets_a_token_dense_or_sparse(server, tinker) -> None:
    model_id = tinker.create_model()
    targets = {"data": [6, 9, 7, 0, 8, 5], "dtype": "int64", "shape": [3, 2]}
    sparse = {
        "data": [6, 9, 7, 8, 5], "dtype": "int64", "shape": [3, 2],
        "sparse_crow_indices": [0, 2, 3, 5], "sparse_col_indices": [0, 1, 0, 0, 1],
    }  # fmt: skip
    weights = {"data": [0.5, 0.5, 1.0, 0.0, 0.25, 0.75], "dtype": "float32", "shape": [3, 2]}
    for given in (targets, sparse):
        answer = tinker.forward_backward(model_id, datum(target_tokens=given, weights=weights), DATUM)
        wide, narrow = server.engine.calls[-1][1].data
        assert (wide.width, narrow.width) == (2, 1)
        assert np.frombuffer(wide.targets, "<i4").tolist() == targets["data"]
        assert np.frombuffer(wide.coefficients, "<f4").tolist() == weights["data"]
        shapes = [output["logprobs"]["shape"] for output in answer["loss_fn_outputs"]]
        assert shapes == [[3, 2], [3]]


def test_steps_and_tokens_are_counted(tinker) -> None:
    def counted() -> tuple[float, float]:
        lines = dict(
            line.rsplit(" ", 1) for line in tinker.http.get("/metrics").text.splitlines() if line[0] != "#"
        )
        tokens = lines['coserve_finetune_tokens_total{kind="trained"}']
        return float(lines["coserve_finetune_steps_total"]), float(tokens)

    model_id = tinker.create_model()
    steps, tokens = counted()
    tinker.forward_backward(model_id, DATUM, DATUM)
    tinker.call("forward", model_id, forward_input={"data": [DATUM], "loss_fn": "cross_entropy"})
    tinker.call("optim_step", model_id)
    assert counted() == (steps + 1, tokens + 4)


def test_what_a_pass_becomes_and_what_it_answers(server, tinker) -> None:
    model_id = tinker.create_model()
    answer = tinker.forward_backward(model_id)
    (datum,) = server.engine.calls[0][1].data
    assert np.frombuffer(datum.tokens, "<i4").tolist() == [5, 6, 7]
    assert np.frombuffer(datum.targets, "<i4").tolist() == [6, 7, 8]
    assert np.frombuffer(datum.coefficients, "<f4").tolist() == [0.0, 1.0, -0.5]
    assert answer["metrics"] == {"loss:sum": 1.5}
    (output,) = answer["loss_fn_outputs"]
    assert output["logprobs"] == {"data": [-0.5] * 3, "dtype": "float32", "shape": [3]}


def test_a_pass_in_protobuf_is_the_same(server, tinker) -> None:
    model_id = tinker.create_model()
    message = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn="ppo", forward_only=True)
    message.loss_fn_config_v2["clip_low_threshold"].number = 0.5
    for length in (3, 1):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(5, 5 + length, dtype="<i4").tobytes()
        for name, dtype in (("target_tokens", "<i8"), ("logprobs", "<f4"), ("advantages", "<f4")):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype = pb.DTYPE_INT64 if dtype == "<i8" else pb.DTYPE_FLOAT32
            tensor.dense, tensor.shape[:] = np.full(length, 2, dtype).tobytes(), [length]
    headers = {"content-type": "application/x-protobuf"}
    sent = tinker.http.post("/api/v1/forward_backward", content=message.SerializeToString(), headers=headers)
    assert sent.status_code == 200, sent.text
    tinker.wait(sent.json())
    (call,) = [call for _, call in server.engine.calls]
    assert call.loss == LossSettings(name="ppo", clip_low=0.5, clip_high=1.2) and not call.backward
    assert np.frombuffer(call.data[0].sampled_logprobs, "<f4").tolist() == [2.0] * 3
    got = tinker.http.post(
        "/api/v1/retrieve_future",
        json={"request_id": sent.json()["request_id"], "allow_metadata_only": True},
        headers={"accept": "application/x-protobuf"},
    )
    assert got.headers["content-type"] == "application/x-protobuf"
    output = pb.ForwardBackwardOutput.FromString(got.content)
    assert output.metrics == {"loss:sum": 1.5}
    (record,) = output.loss_fn_outputs
    logprobs = record.fields["logprobs"]
    assert record.num_datums == 2 and np.frombuffer(logprobs.offsets, "<i8").tolist() == [0, 12, 16]
    assert np.frombuffer(logprobs.data, "<f4").tolist() == [-0.5] * 4
    bad = tinker.http.post("/api/v1/forward_backward", content=b"\xff\xff", headers=headers)
    assert bad.status_code == 400 and bad.json()["error"]["code"] == "invalid_protobuf"


@pytest.mark.parametrize(
    ("loss", "config", "expected"),
    [
        ("ppo", {}, LossSettings(name="ppo", clip_low=0.8, clip_high=1.2)),
        ("cispo", {}, LossSettings(name="cispo", clip_low=0.0, clip_high=4.0)),
        ("cispo", {"clip_high_threshold": 2}, LossSettings(name="cispo", clip_low=0.0, clip_high=2.0)),
        ("dro", {"beta": 0.25}, LossSettings(name="dro", beta=0.25)),
        ("importance_sampling", {}, LossSettings(name="importance_sampling")),
    ],
)
def test_losses_and_their_settings(server, tinker, loss, config, expected) -> None:
    model_id = tinker.create_model()
    inputs = {
        "target_tokens": {"data": [6, 7, 8], "dtype": "int64"},
        "logprobs": {"data": [-1.0, -2.0, -3.0], "dtype": "float32"},
        "advantages": {"data": [1, 0, -1], "dtype": "float32", "shape": [3, 1]},
    }
    given = {"data": [DATUM | {"loss_fn_inputs": inputs}], "loss_fn": loss, "loss_fn_config": config}
    tinker.call("forward_backward", model_id, forward_backward_input=given)
    assert server.engine.calls[0][1].loss == expected
    assert np.frombuffer(server.engine.calls[0][1].data[0].coefficients, "<f4").tolist() == [1, 0, -1]


def datum(**changes) -> dict:
    inputs = {name: value for name, value in (DATUM["loss_fn_inputs"] | changes).items() if value is not None}
    return DATUM | {"loss_fn_inputs": inputs}


INTS = {"data": [6, 7, 8], "dtype": "int64"}
ONES = {"data": [1.0, 1.0, 1.0], "dtype": "float32"}
BAD_DATA = [
    (datum(weights=None), "data[0].loss_fn_inputs.weights"),
    (datum(weights=ONES | {"data": [1.0]}), "data[0].loss_fn_inputs.weights"),
    (datum(weights=ONES | {"data": ["x", 1, 1]}), "data[0].loss_fn_inputs.weights.data"),
    (datum(weights=ONES | {"dtype": "bfloat16"}), "data[0].loss_fn_inputs.weights.dtype"),
    (datum(advantages=ONES), "data[0].loss_fn_inputs.advantages"),
    (datum(target_tokens=INTS | {"data": [6, 7, 10**6]}), "data[0].loss_fn_inputs.target_tokens"),
    (datum(target_tokens=INTS | {"data": [6, 7, -1]}), "data[0].loss_fn_inputs.target_tokens"),
    (datum(target_tokens=INTS | {"data": [1] * 6, "shape": [3, 2]}), "data[0].loss_fn_inputs.weights"),
    (datum(target_tokens=INTS | {"shape": [3, 2]}), "data[0].loss_fn_inputs.target_tokens"),
    (datum(target_tokens=INTS | {"shape": [3, 1000]}), "data[0].loss_fn_inputs.target_tokens"),
    (datum(target_tokens=INTS | {"shape": [1, 3, 1]}), "data[0].loss_fn_inputs.target_tokens"),
    (datum(target_tokens=INTS | {"sparse_crow_indices": [0]}), "data[0].loss_fn_inputs.target_tokens"),
    (
        datum(
            target_tokens={
                "data": [6, 7],
                "dtype": "int64",
                "shape": [3, 2],
                "sparse_crow_indices": [0, 1, 2, 2],
                "sparse_col_indices": [0, 2],
            }
        ),
        "data[0].loss_fn_inputs.target_tokens",
    ),
    (DATUM | {"model_input": {"chunks": []}}, "data[0].model_input"),
    (DATUM | {"model_input": {"chunks": [{"tokens": [1] * 300}]}}, "data[0].model_input"),
    (DATUM | {"model_input": {"chunks": [{"tokens": [2**70]}]}}, "data[0].model_input"),
    (DATUM | {"model_input": {"chunks": [{"type": "image"}]}}, "data[0].model_input.chunks[0].type"),
    (DATUM | {"weight": 1}, "data[0].weight"),
]


@pytest.mark.parametrize(("bad", "param"), BAD_DATA, ids=[str(n) for n in range(len(BAD_DATA))])
def test_data_that_cant_be_trained_on_are_named(server, tinker, bad, param) -> None:
    model_id = tinker.create_model()
    given = {"data": [bad], "loss_fn": "cross_entropy"}
    found = tinker.refused("forward_backward", model_id=model_id, seq_id=1, forward_backward_input=given)
    assert found["status"] == 400 and found["param"] == param
    assert server.engine.calls == []


CREATE = {"model_seq_id": 0, "base_model": BASE, "lora_config": LORA}
BAD_REQUESTS = [
    ("create_model", CREATE | {"base_model": "gpt-9"}, "base_model"),
    ("create_model", CREATE | {"lora_config": {"rank": 65}}, "lora_config.rank"),
    ("create_model", CREATE | {"lora_config": {"rank": 4, "alpha": 8}}, "lora_config.alpha"),
    (
        "create_model",
        CREATE | {"lora_config": {"train_mlp": False, "train_attn": False, "train_unembed": False}},
        "lora_config.train_mlp",
    ),
    ("create_model", CREATE | {"optimizer_config": {"type": "dimuon"}}, "optimizer_config.type"),
    ("create_model", CREATE | {"model_seq_id": None}, "model_seq_id"),
    ("create_model", CREATE | {"lora_config": None}, "lora_config"),
    ("create_model", CREATE | {"colour": "red"}, "colour"),
    ("create_model", CREATE | {"type": "create_session"}, "type"),
    ("create_model", CREATE | {"user_metadata": {str(n): "" for n in range(101)}}, "user_metadata"),
    ("create_model", CREATE | {"user_metadata": {"a": "x" * 70_000}}, "user_metadata"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD_REQUESTS, ids=[b[2] for b in BAD_REQUESTS])
def test_models_that_cant_be_made_are_named(tinker, path, body, param) -> None:
    found = tinker.refused(path, session_id=tinker.session, **body)
    assert found["status"] == 400 and found["param"] == param


BAD_CALLS = [
    ("optim_step", {"adam_params": {"beta1": 1.0}}, "adam_params.beta1"),
    ("optim_step", {"adam_params": {"learning_rate": -1}}, "adam_params.learning_rate"),
    ("optim_step", {"adam_params": {"momentum": 1}}, "adam_params.momentum"),
    ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "optimizer_params"),
    ("save_weights", {"path": "../up"}, "path"),
    ("save_weights", {"path": "a/b"}, "path"),
    ("save_weights", {"path": "ok", "ttl_seconds": 10}, "ttl_seconds"),
    ("save_weights", {"path": "ok", "user_metadata": {"a": 1}}, "user_metadata.a"),
    ("save_weights_for_sampler", {}, "path"),
    ("save_weights_for_sampler", {"path": "ok", "kind": "inflight"}, "kind"),
    ("load_weights", {"path": "/etc/passwd", "optimizer": False}, "path"),
    ("load_weights", {"path": "tinker://a/weights/b", "optimizer": False}, "path"),
    ("load_weights", {"path": "tinker://a/weights/b", "weights_access_token": "x"}, "weights_access_token"),
    ("get_info", {"model_id": "nobody"}, "model_id"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD_CALLS, ids=[f"{b[0]}-{b[2]}" for b in BAD_CALLS])
def test_calls_that_cant_be_done_are_named(server, tinker, path, body, param) -> None:
    model_id = tinker.create_model()
    numbered = {} if path == "get_info" else {"seq_id": 1}
    found = tinker.refused(path, **{"model_id": model_id, **numbered, **body})
    assert found["status"] in (400, 404) and found["param"] == param and server.engine.calls == []


def test_an_answer_is_asked_for_until_it_is_there(server, tinker, monkeypatch) -> None:
    monkeypatch.setattr(future_routes, "LONG_POLL", 0.05)
    model_id = tinker.create_model()
    server.engine.hold_calls.clear()
    answer = tinker.ok("optim_step", model_id=model_id, seq_id=1)
    made = tinker.ok("create_model", session_id=tinker.session, **CREATE | {"model_seq_id": 1})
    states = []
    for waiting in (answer, made):
        response = tinker.post("retrieve_future", request_id=waiting["request_id"])
        assert response.status_code == 408 and response.json()["type"] == "try_again"
        states.append(response.json()["queue_state"])
    assert states == ["active", "paused_capacity"]
    server.call(set_event(server.engine.hold_calls))
    assert tinker.wait(answer) == {"type": "optim_step", "metrics": {"grad_norm:mean": 2.0}}
    gone = tinker.refused("retrieve_future", request_id="never-there")
    assert gone["status"] == 410 and gone["code"] == "gone"


async def set_event(event) -> None:
    event.set()


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (FailedPrecondition("not finite", param="adam_params"), "user"),
        (InternalError("broken"), "server"),
        (Unavailable("died"), "server"),
    ],
)
def test_a_call_that_fails_says_whose_fault_it_was(server, tinker, error, category) -> None:
    model_id = tinker.create_model()
    server.engine.fail_call = error
    found = tinker.call("optim_step", model_id)
    assert found["error"] == error.message and found["category"] == category
    server.engine.fail_call = None
    assert "metrics" in tinker.call("optim_step", model_id)


def test_too_many_calls_at_once_are_told_to_come_back(server, tinker, monkeypatch) -> None:
    model_id = tinker.create_model()
    monkeypatch.setattr(futures, "MAX_PENDING", 2)
    server.engine.hold_calls.clear()
    asked = [tinker.ok("optim_step", model_id=model_id, seq_id=n) for n in (1, 2)]
    response = tinker.post("optim_step", model_id=model_id, seq_id=3)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    server.call(set_event(server.engine.hold_calls))
    for answer in asked:
        tinker.wait(answer)
    assert "metrics" in tinker.wait(tinker.ok("optim_step", model_id=model_id, seq_id=3))


def test_an_engine_that_was_started_again_has_lost_its_models(server, tinker) -> None:
    """Nothing hangs; a load brings the model back."""
    model_id = tinker.create_model()
    tinker.call("save_weights", model_id, path="before")
    info = server.engine.info
    server.engine.models.clear()
    server.engine.info = msgspec.structs.replace(info, pid=info.pid + 1)
    try:
        lost = tinker.forward_backward(model_id)
        assert (
            lost["category"] == "server"
            and lost["code"] == "model_lost"
            and "load" in lost["message" if "message" in lost else "error"]
        )
        path = f"tinker://{model_id}/weights/before"
        back = tinker.call("load_weights", model_id, path=path, optimizer=True)
        assert back == {"type": "load_weights", "path": path, "model_id": model_id}
        assert model_id in server.engine.models
        assert "metrics" in tinker.forward_backward(model_id)
    finally:
        server.engine.info = info


def test_saves_are_kept_and_listed_and_loaded(server, tinker) -> None:
    model_id = tinker.create_model(rank=4, train_unembed=False, train_mlp=False)
    state = tinker.call("save_weights", model_id, path="one", ttl_seconds=7200, user_metadata={"k": "v"})
    assert state == {"type": "save_weights", "path": f"tinker://{model_id}/weights/one"}
    again = tinker.call("save_weights", model_id, path="one")
    assert again["category"] == "user" and "overwrite" in again["error"]
    assert "path" in tinker.call("save_weights", model_id, path="one", overwrite=True)
    sampler = tinker.call("save_weights_for_sampler", model_id, path="s-1")
    assert sampler["path"] == f"tinker://{model_id}/sampler_weights/s-1"
    saves = [call for _, call in server.engine.calls if isinstance(call, Save)]
    assert [save.optimizer for save in saves] == [True, True, False]
    run = tinker.get(f"training_runs/{model_id}")
    assert run["lora_rank"] == 4 and run["base_model"] == BASE and run["is_lora"]
    assert run["last_checkpoint"]["tinker_path"] == state["path"]
    assert run["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/s-1"
    listed = tinker.get(f"training_runs/{model_id}/checkpoints")["checkpoints"]
    assert [c["checkpoint_type"] for c in listed] == ["sampler", "training"]
    assert listed[1]["expires_at"] is None and listed[1]["size_bytes"] > 1000
    everything = tinker.get("checkpoints", limit=1)
    assert everything["cursor"]["total_count"] >= 2 and len(everything["checkpoints"]) == 1
    assert tinker.get("training_runs", limit=1)["training_runs"][0]["training_run_id"] == model_id
    info = tinker.ok("weights_info", tinker_path=state["path"])
    assert info["lora_rank"] == 4 and info["train_attn"] and not info["train_mlp"]
    answer = tinker.ok(
        "load_weights",
        session_id=tinker.session,
        model_seq_id=5,
        path=state["path"],
        optimizer=True,
    )
    assert tinker.wait(answer)["model_id"] == f"{tinker.session}:train:5"
    spec = server.engine.models[f"{tinker.session}:train:5"]
    assert spec.lora == server.engine.models[model_id].lora
    assert isinstance(server.engine.calls[-1][1], Load) and server.engine.calls[-1][1].optimizer
    wrong = tinker.create_model(rank=8)
    found = tinker.refused("load_weights", model_id=wrong, seq_id=1, path=state["path"], optimizer=False)
    assert found["param"] == "path"
    found = tinker.refused("load_weights", model_id=model_id, path=sampler["path"], optimizer=True)
    assert found["param"] == "optimizer"
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/one"
    assert tinker.http.put(f"{url}/ttl", json={"ttl_seconds": 3600}).status_code == 204
    assert tinker.get(f"training_runs/{model_id}/checkpoints")["checkpoints"][1]["expires_at"]
    assert tinker.http.delete(url).status_code == 204
    assert tinker.http.delete(url).status_code == 404
    folder = saves[1].directory
    wait_for(lambda: not Path(folder).exists())


def test_a_sampler_checkpoint_answers_chat(server, tinker) -> None:
    model_id = tinker.create_model(train_unembed=False)
    path = tinker.call("save_weights_for_sampler", model_id, path="chat")["path"]
    answer = tinker.http.post(
        "/v1/chat/completions", json={"model": path, "messages": [{"role": "user", "content": "Hi"}]}
    )
    assert answer.status_code == 200 and answer.json()["model"] == path
    assert server.engine.requests[-1].adapter is not None
    assert server.engine.requests[-1].adapter.name == path


def test_a_model_that_is_unloaded_is_gone(server, tinker) -> None:
    model_id = tinker.create_model()
    waiting = tinker.ok("optim_step", model_id=model_id, seq_id=2)
    done = tinker.wait(tinker.ok("unload_model", model_id=model_id))
    assert done == {"type": "unload_model", "model_id": model_id}
    assert tinker.wait(waiting)["category"] == "user"
    assert model_id not in server.engine.models
    assert tinker.refused("optim_step", model_id=model_id, seq_id=1)["status"] == 404
    assert tinker.get(f"training_runs/{model_id}")["training_run_id"] == model_id


def test_early_calls_leave_room_for_the_one_they_wait_for(server, tinker, monkeypatch) -> None:
    model_id = tinker.create_model()
    monkeypatch.setattr(futures, "MAX_PENDING", 3)
    early = [tinker.ok("optim_step", model_id=model_id, seq_id=n) for n in (2, 3, 4)]
    assert tinker.post("optim_step", model_id=model_id, seq_id=5).status_code == 429
    first = tinker.ok("optim_step", model_id=model_id, seq_id=1)
    for answer in (first, *early):
        tinker.wait(answer)
    monkeypatch.setattr(futures, "MAX_REQUEST_BYTES", 1)
    server.engine.hold_calls.clear()
    given = {"data": [DATUM], "loss_fn": "cross_entropy"}
    asked = tinker.ok("forward", model_id=model_id, seq_id=5, forward_input=given)
    full = tinker.post("forward", model_id=model_id, seq_id=6, forward_input=given)
    assert full.status_code == 429 and full.json()["error"]["code"] == "too_many_pending"
    server.call(set_event(server.engine.hold_calls))
    tinker.wait(asked)
    tinker.wait(tinker.ok("forward", model_id=model_id, seq_id=6, forward_input=given))


def test_a_model_that_waits_for_its_place_goes_with_its_session(server, tinker) -> None:
    server.engine.hold_calls.clear()
    body = {"session_id": tinker.session, "model_seq_id": 0, "base_model": BASE, "lora_config": LORA}
    made = tinker.ok("create_model", **body)
    tinker.ok(f"sessions/{tinker.session}/finish", reason={"type": "success"})
    server.call(set_event(server.engine.hold_calls))
    assert tinker.refused("retrieve_future", request_id=made["request_id"])["status"] == 410
    assert made["model_id"] not in server.engine.models


def test_weights_that_dont_load_leave_no_model(server, tinker) -> None:
    model_id = tinker.create_model()
    path = tinker.call("save_weights", model_id, path="x")["path"]
    server.engine.fail_call = FailedPrecondition("The saved files are damaged.", param="path")
    asked = tinker.ok("load_weights", session_id=tinker.session, model_seq_id=3, path=path, optimizer=False)
    assert tinker.wait(asked)["category"] == "user"
    assert asked["model_id"] not in server.engine.models
    assert tinker.refused("get_info", model_id=asked["model_id"])["status"] == 404
