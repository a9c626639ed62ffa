"""Odd bodies on every route of Tinker's API: an answer or an error that names something, no fault of ours."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from coserve.server.grpc_gen import tinker_pb2 as pb
from coserve.server.tinker import future_routes
from tests.server.running import BASE, ServerThread
from tests.server.tinker_client import DATUM, Tinker

ODD: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 2**70, -(2**70), 1e308, "", "x", "\x00", "tinker://", "tinker://a/b/c",
    "\ud7ff" * 9, [], [[]], [None], ["x"], [2**70], {}, {"": ""}, {"a": {"b": []}}, "x" * 3000, [1] * 300,
]  # fmt: skip
CASES = 400


def bodies(session: str, model_id: str, sampler: str, path: str) -> dict[str, dict[str, Any]]:
    """A good body for each route."""
    given = {"data": [DATUM], "loss_fn": "ppo", "loss_fn_config": {"clip_low_threshold": 0.5}}
    call = {"model_id": model_id, "seq_id": 1}
    lora = {"rank": 4, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": True}
    return {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "1"},
        "session_heartbeat": {"session_id": session},
        "create_model": {
            "session_id": session, "model_seq_id": 77, "base_model": BASE, "lora_config": lora,
            "user_metadata": {"a": 1}, "optimizer_config": {"type": "adamw"}, "type": "create_model",
        },
        "get_info": {"model_id": model_id},
        "forward": call | {"forward_input": given},
        "forward_backward": call | {"forward_backward_input": given},
        "optim_step": call | {"adam_params": {"learning_rate": 1e-3, "beta1": 0.5, "grad_clip_norm": 1.0}},
        "save_weights": call | {"path": "n", "ttl_seconds": 3600, "overwrite": True, "user_metadata": {}},
        "save_weights_for_sampler": call | {"path": "n", "sampling_session_seq_id": 3, "kind": "snapshot"},
        "load_weights": call | {"path": path, "optimizer": False},
        "create_sampling_session": {
            "session_id": session, "sampling_session_seq_id": 9, "base_model": BASE, "model_path": path,
        },
        "asample": {
            "sampling_session_id": sampler, "seq_id": 5, "num_samples": 2, "prompt": DATUM["model_input"],
            "sampling_params": {"max_tokens": 2, "stop": ["x"], "top_k": 3, "top_p": 0.5, "seed": 3},
            "prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 1,
        },
        "cancel_future": {"request_id": "x"},
        "weights_info": {"tinker_path": path},
        "client/config": {"sdk_version": "1"},
    }  # fmt: skip


def places(body: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a body."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    return [found for key, value in items for found in ((body, key), *places(value))]


@pytest.fixture
def good(server: ServerThread, http) -> dict[str, dict[str, Any]]:
    tinker = Tinker(http)
    model_id = tinker.create_model(train_unembed=False)
    path = tinker.call("save_weights", model_id, path="odd")["path"]
    made = tinker.ok(
        "create_sampling_session", session_id=tinker.session, sampling_session_seq_id=0, model_path=path
    )
    return bodies(tinker.session, model_id, made["sampling_session_id"], path)


def test_odd_fields_are_refused_or_taken(server, http, good, monkeypatch) -> None:
    monkeypatch.setattr(future_routes, "LONG_POLL", 0.02)
    rng = random.Random(7)
    for case in range(CASES):
        route = rng.choice(list(good))
        body = copy.deepcopy(good[route])
        for _ in range(rng.randint(1, 2)):
            found = places(body)
            if not found:
                break
            container, key = rng.choice(found)
            if isinstance(container, dict) and rng.random() < 0.2:
                container.pop(key, None)
            elif isinstance(container, dict) and rng.random() < 0.1:
                container[rng.choice(["extra", "", "type"])] = copy.deepcopy(rng.choice(ODD))
            elif isinstance(container, dict) or key < len(container):
                container[key] = copy.deepcopy(rng.choice(ODD))
        if "seq_id" in body and rng.random() < 0.8:
            body["seq_id"] = 2 + case
        response = http.post(f"/api/v1/{route}", json=body)
        assert response.status_code < 500, (route, body, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert error["message"] and error["code"], (route, body)
        elif "request_id" in response.json() and rng.random() < 0.3:
            asked = {"request_id": response.json()["request_id"]}
            answer = http.post("/api/v1/retrieve_future", json=asked)
            assert answer.status_code in (200, 408), (route, body, answer.text)
            assert answer.json().get("code") != "internal_error", (route, body, answer.text)
        if case % 50 == 0:
            server.server.context.tinker.futures.end_session(good["session_heartbeat"]["session_id"])
    assert http.get("/api/v1/healthz").status_code == 200


def test_bytes_that_are_no_message_are_refused(server, http, good) -> None:
    rng = random.Random(8)
    message = pb.ForwardBackwardRequest(
        model_id=good["get_info"]["model_id"], seq_id=1, loss_fn="cross_entropy"
    )
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = bytes(range(12))
    for name in ("target_tokens", "weights"):
        datum.loss_fn_inputs[name].dense, datum.loss_fn_inputs[name].dtype = bytes(12), pb.DTYPE_FLOAT32
    whole = message.SerializeToString()
    headers = {"content-type": "application/x-protobuf"}
    for _ in range(CASES // 2):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            action = rng.random()
            if action < 0.5:
                data[place] = rng.randrange(256)
            elif action < 0.75:
                del data[place]
            else:
                data[place:place] = rng.randbytes(3)
        response = http.post("/api/v1/forward_backward", content=bytes(data), headers=headers)
        assert response.status_code < 500, (bytes(data), response.text)
        assert response.status_code == 200 or response.json()["error"]["code"]


@pytest.mark.parametrize("route", ["asample", "create_model", "forward_backward", "retrieve_future"])
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b'"x"', b"\xff\xfe", b"{" * 3000])
def test_bodies_that_are_no_object_are_refused(http, route, body) -> None:
    response = http.post(f"/api/v1/{route}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]
    response = http.post(f"/api/v1/{route}", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 415


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "offset=-1", "offset=99999999999999", "limit=1001"])
def test_pages_that_there_arent(http, query) -> None:
    for route in ("training_runs", "checkpoints", "sessions"):
        assert http.get(f"/api/v1/{route}?{query}").status_code == 400
