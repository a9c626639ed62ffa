"""Tinker's sessions, samplers and keys."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from coserve.errors import QueueFull
from coserve.server.grpc_gen import tinker_pb2 as pb
from coserve.server.tinker import sessions
from tests.server.fake_engine import EOS, TOKENIZER
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.tinker_client import Tinker


@pytest.fixture
def tinker(server: ServerThread, http) -> Tinker:
    return Tinker(http)


def test_what_a_client_asks_before_it_begins(tinker) -> None:
    assert tinker.get("healthz") == {"status": "ok"}
    (model,) = tinker.get("get_server_capabilities")["supported_models"]
    assert model["model_name"] == BASE and model["trainable"] and model["max_context_length"] == 256
    config = tinker.ok("client/config", sdk_version="0.38.0")
    assert config["fwdbwd_max_chunk_len"] == 1024 and config["pjwt_auth_enabled"] is False
    assert tinker.ok("client/dynamic_config", sdk_version="0.38.0")["sample_cancel_enabled"]
    assert tinker.ok("telemetry", events=[{"anything": 1}]) == {"status": "accepted"}


def test_a_session_is_finished_with_all_that_it_holds(server, tinker) -> None:
    model_id = tinker.create_model()
    sampler = tinker.call("save_weights_for_sampler", model_id, sampling_session_seq_id=0)
    assert sampler["sampling_session_id"] == f"{tinker.session}:sample:0"
    found = tinker.get(f"sessions/{tinker.session}")
    assert found["training_run_ids"] == [model_id] and found["sampler_ids"] == [
        sampler["sampling_session_id"]
    ]
    assert found["user_metadata"] == {"a": "b"}
    assert tinker.get("sessions")["sessions"][0] == tinker.session
    path = tinker.get(f"samplers/{sampler['sampling_session_id']}")["model_path"]
    assert path.startswith(f"tinker://{model_id}/sampler_weights/")
    assert tinker.get(f"training_runs/{model_id}/checkpoints")["checkpoints"] == []
    assert tinker.ok("session_heartbeat", session_id=tinker.session) == {"type": "session_heartbeat"}
    tinker.ok(f"sessions/{tinker.session}/finish", reason={"type": "success"}, detail=None)
    assert model_id not in server.engine.models
    assert tinker.refused("session_heartbeat", session_id=tinker.session)["status"] == 410
    assert tinker.refused("optim_step", model_id=model_id)["status"] == 404
    asked = {"sampling_session_id": sampler["sampling_session_id"], "seq_id": 0, "sampling_params": {}}
    assert tinker.refused("asample", prompt={"chunks": []}, **asked)["status"] == 410
    chat = {"model": path, "messages": [{"role": "user", "content": "Hi"}]}
    assert tinker.http.post("/v1/chat/completions", json=chat).status_code == 404
    folders = Path(server.config.state_dir) / "tinker"
    wait_for(lambda: not list(folders.iterdir()) or model_id in server.engine.models)


def test_files_of_a_save_go_after_their_last_reader(server, tinker) -> None:
    context = server.server.context
    path = tinker.call("save_weights_for_sampler", tinker.create_model(), path="read")["path"]
    saved = context.tinker.runs.saved(path, None)
    folder = Path(saved.folder)

    async def delete_while_it_is_read() -> bool:
        async with context.generator.using(saved.folder):
            await context.tinker.runs.delete(saved)
            await asyncio.sleep(0.05)
            return folder.is_dir()

    assert server.call(delete_while_it_is_read())
    wait_for(lambda: not folder.exists())


def test_a_silent_session_ends(server, tinker, monkeypatch) -> None:
    model_id = tinker.create_model()
    service = server.server.context.tinker
    server.call(service.sweep())
    assert model_id in server.engine.models
    monkeypatch.setattr(sessions, "TIMEOUT", -1.0)
    server.call(service.sweep())
    assert model_id not in server.engine.models
    assert tinker.refused("session_heartbeat", session_id=tinker.session)["status"] == 410


def test_samples_of_the_base(server, tinker) -> None:
    made = tinker.ok(
        "create_sampling_session", session_id=tinker.session, sampling_session_seq_id=0, base_model=BASE
    )
    sampler = made["sampling_session_id"]
    server.engine.reply = "Hello there"
    answer = tinker.sample(
        sampling_session_id=sampler,
        seq_id=0,
        num_samples=3,
        sampling_params={"max_tokens": 50, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "seed": 11},
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
    )
    ids = [*TOKENIZER.encode("Hello there", add_special_tokens=False), EOS]
    assert [s["tokens"] for s in answer["sequences"]] == [ids] * 3
    assert all(s["stop_reason"] == "stop" and s["logprobs"] == [-0.5] * len(ids) for s in answer["sequences"])
    assert len(answer["sequences"][0]["topk_logprobs"][0]) == 3
    assert answer["prompt_logprobs"] == [None, -0.5, -0.5]
    assert len(answer["topk_prompt_logprobs"][1]) == 2
    samplings = [request.sampling for request in server.engine.requests]
    assert [s.seed for s in samplings] == [11, 12, 13]
    assert samplings[0].temperature == 0.5 and samplings[0].top_k == 5 and samplings[0].top_p == 0.9
    short = tinker.sample(sampling_session_id=sampler, seq_id=1, sampling_params={"max_tokens": 2})
    assert short["sequences"][0]["stop_reason"] == "length" and "prompt_logprobs" not in short


def test_a_sample_in_protobuf(server, tinker) -> None:
    asked = tinker.ok(
        "asample",
        base_model=BASE,
        prompt={"chunks": [{"tokens": [5, 6, 7]}]},
        sampling_params={"max_tokens": 2},
        prompt_logprobs=True,
        prompt_logprobs_last_n=1,
        topk_sample_logprobs=2,
    )
    assert asked["sample_sequence_ids"] == [asked["request_id"] + ":0"]
    response = tinker.http.post(
        "/api/v1/retrieve_future",
        json={"request_id": asked["request_id"]},
        headers={"accept": "application/x-protobuf"},
    )
    answer = pb.SampleResponse.FromString(response.content)
    (sequence,) = answer.sequences
    assert sequence.stop_reason == pb.STOP_REASON_LENGTH and len(sequence.tokens) == 8
    assert np.frombuffer(sequence.logprobs, "<f4").tolist() == [-0.5, -0.5]
    assert sequence.topk_sampled_logprobs.k == 2 and sequence.topk_sampled_logprobs.length == 2
    prompt = np.frombuffer(answer.prompt_logprobs, "<f4")
    assert np.isnan(prompt).tolist() == [True, True, False] and prompt[2] == -0.5


@pytest.mark.parametrize(
    ("stop", "ids", "ignores_end"),
    [(None, (), False), ([], (), True), ([7, 8], (7, 8), False), ("x", (), False), (["x", "y"], (), False)],
)
def test_stops_by_text_and_by_id(server, tinker, stop, ids, ignores_end) -> None:
    server.engine.reply = "abc xyz"
    answer = tinker.sample(base_model=BASE, sampling_params={"max_tokens": 20, "stop": stop})
    sampling = server.engine.requests[-1].sampling
    assert sampling.stop_token_ids == ids and sampling.ignore_eos == ignores_end
    text = TOKENIZER.decode(answer["sequences"][0]["tokens"])
    if isinstance(stop, str) or (stop and isinstance(stop[0], str)):
        assert text.startswith("abc x") and "z" not in text
        assert answer["sequences"][0]["stop_reason"] == "stop"


def test_a_sample_waits_for_a_place_in_the_queue(server, tinker) -> None:
    server.engine.refusal = QueueFull("as many wait as may", retry_after=0.1)
    asked = tinker.ok(
        "asample", base_model=BASE, prompt={"chunks": [{"tokens": [5]}]}, sampling_params={"max_tokens": 1}
    )
    wait_for(lambda: len(server.engine.requests) >= 2)
    server.engine.refusal = None
    assert len(tinker.wait(asked)["sequences"]) == 1


def test_a_sample_that_is_cancelled_is_aborted(server, tinker) -> None:
    server.engine.hold.clear()
    asked = tinker.ok(
        "asample", base_model=BASE, prompt={"chunks": [{"tokens": [5]}]}, sampling_params={"max_tokens": 9}
    )
    wait_for(lambda: server.engine.requests)
    tinker.ok("cancel_future", request_id=asked["request_id"])
    wait_for(lambda: server.engine.aborted)
    server.engine.hold.set()
    assert tinker.wait(asked)["category"] == "user"


BAD_SAMPLES = [
    ({"sampling_params": {"n": 2}}, "sampling_params.n"),
    ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"sampling_params": {"stop": [7, "x"]}}, "sampling_params.stop"),
    ({"sampling_params": {"max_tokens": 1000}}, "max_tokens"),
    ({"num_samples": 0}, "num_samples"),
    ({"num_samples": 1000}, "num_samples"),
    ({"prompt": {"chunks": []}}, "prompt"),
    ({"prompt": {"chunks": [{"tokens": [10**6]}]}}, "prompt"),
    ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
    ({"record_stability_info": True}, "record_stability_info"),
    ({"topk_sample_logprobs": 1000}, "topk_sample_logprobs"),
    ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n"),
    ({"base_model": "gpt-9"}, "base_model"),
    ({"base_model": None, "model_path": "x"}, "model_path"),
    ({"base_model": None, "model_path": "tinker://a/weights/b"}, "model_path"),
    ({"base_model": None}, "model_path"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize(
    ("change", "param"), BAD_SAMPLES, ids=[b[1] + str(n) for n, b in enumerate(BAD_SAMPLES)]
)
def test_samples_that_cant_be_taken_are_named(tinker, change, param) -> None:
    body = {
        "base_model": BASE,
        "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 4},
    }
    found = tinker.refused("asample", **body | change)
    assert found["status"] in (400, 404) and found["param"] == param


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keyed")
    keys = {"tml-one": "tune", "tml-two": "tune", "tml-use": "use"}
    entries = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "role": role, "max_jobs": 1}
        for key, role in keys.items()
    ]
    (folder / "keys.json").write_text(json.dumps({"keys": entries}))
    server = ServerThread(folder / "s", keys_file=str(folder / "keys.json"))
    yield server
    server.stop()


def of(server: ServerThread, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=20, verify=False)


def test_a_key_sees_what_is_its_own(keyed) -> None:
    one, two = Tinker(of(keyed, "tml-one")), Tinker(of(keyed, "tml-two"))
    model_id = one.create_model()
    path = one.call("save_weights", model_id, path="mine")["path"]
    asked = one.ok("optim_step", model_id=model_id)
    assert two.refused("retrieve_future", request_id=asked["request_id"])["status"] == 410
    assert two.refused("optim_step", model_id=model_id)["status"] == 404
    assert two.refused("session_heartbeat", session_id=one.session)["status"] == 410
    assert two.refused("weights_info", tinker_path=path)["status"] == 404
    assert two.refused("load_weights", session_id=two.session, model_seq_id=0, path=path)["status"] == 404
    assert two.get("training_runs")["training_runs"] == [] and two.get("checkpoints")["checkpoints"] == []
    assert two.http.get(f"/api/v1/training_runs/{model_id}").status_code == 404
    body = {"session_id": one.session, "model_seq_id": 9, "base_model": BASE, "lora_config": {"rank": 4}}
    more = one.post("create_model", **body)
    assert more.status_code == 429 and more.json()["error"]["code"] == "max_jobs_exceeded"


def test_roles_and_credentials(keyed) -> None:
    with of(keyed, "tml-wrong") as http:
        assert http.get("/api/v1/healthz").status_code == 401
    with httpx.Client(base_url=keyed.url, verify=False) as http:
        assert http.get("/api/v1/get_server_capabilities").status_code == 401
    user = Tinker(of(keyed, "tml-use"))
    body = {"session_id": user.session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}}
    assert user.refused("create_model", **body)["status"] == 403
    assert len(user.sample(base_model=BASE)["sequences"]) == 1
    with of(keyed, "tml-use") as http:  # elsewhere the key belongs into Authorization
        assert http.get("/v1/models").status_code == 401


def test_saves_outlast_the_server(tmp_path) -> None:
    first = ServerThread(tmp_path / "s")
    with first.http() as http:
        tinker = Tinker(http)
        model_id = tinker.create_model(train_unembed=False)
        path = tinker.call("save_weights", model_id, path="kept")["path"]
        tinker.call("save_weights_for_sampler", model_id, sampling_session_seq_id=0)
    first.stop()
    assert len(list((tmp_path / "s" / "tinker").iterdir())) == 2
    second = ServerThread(tmp_path / "s")
    try:
        assert len(list((tmp_path / "s" / "tinker").iterdir())) == 1  # the ephemeral one went
        with second.http() as http:
            again = Tinker(http)
            listed = again.get("checkpoints")["checkpoints"]
            assert [saved["tinker_path"] for saved in listed] == [path]
            asked = again.ok("load_weights", session_id=again.session, model_seq_id=0, path=path)
            assert again.wait(asked)["path"] == path
            old = again.refused("session_heartbeat", session_id=tinker.session)
            assert old["status"] == 410
    finally:
        second.stop()


def test_a_sampler_never_answers_with_other_weights(server, tinker) -> None:
    model_id = tinker.create_model(train_unembed=False)
    path = tinker.call("save_weights", model_id, path="same")["path"]
    made = tinker.ok(
        "create_sampling_session", session_id=tinker.session, sampling_session_seq_id=4, model_path=path
    )
    sampler = made["sampling_session_id"]
    assert len(tinker.sample(sampling_session_id=sampler, seq_id=0)["sequences"]) == 1
    digest = server.engine.requests[-1].adapter.digest
    tinker.call("save_weights", model_id, path="same", overwrite=True)
    body = {"prompt": {"chunks": [{"tokens": [5]}]}, "sampling_params": {"max_tokens": 1}}
    found = tinker.refused("asample", sampling_session_id=sampler, seq_id=1, **body)
    assert found["status"] == 410 and "Other weights" in found["message"]
    assert len(tinker.sample(model_path=path)["sequences"]) == 1
    assert server.engine.requests[-1].adapter.digest != digest
    sampler_path = tinker.call("save_weights_for_sampler", model_id, path="fixed")["path"]
    again = tinker.call("save_weights_for_sampler", model_id, path="fixed")
    assert again["category"] == "user" and sampler_path.endswith("/fixed")


def test_a_key_has_so_many_sessions(keyed, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 1)
    with of(keyed, "tml-two") as http:
        for session in http.get("/api/v1/sessions").json()["sessions"]:
            http.post(f"/api/v1/sessions/{session}/finish", json={})
        body = {"tags": [], "user_metadata": None, "sdk_version": "1"}
        assert http.post("/api/v1/create_session", json=body).status_code == 200
        more = http.post("/api/v1/create_session", json=body)
        assert more.status_code == 429 and more.json()["error"]["code"] == "too_many_sessions"
