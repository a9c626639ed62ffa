"""What all HTTP routes share: envelopes, limits, ids, keys, draining; and the small routes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.fake_engine import DEFAULT_REPLY, MODEL, TOKENIZER
from tests.server.running import BASE, ServerThread, wait_for

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_small_routes(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/version").json()["version"]
    assert http.get(f"/v1/models/{BASE}").json()["parent"] is None


def test_request_ids(http: httpx.Client) -> None:
    given = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1" and given.json()["id"] == "chatcmpl-abc-1"
    made = {http.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert http.get("/nowhere", headers={"x-request-id": "e"}).headers["x-request-id"] == "e"


def test_envelopes_of_refused_requests(http: httpx.Client) -> None:
    missing = http.get("/v1/nowhere")
    assert missing.status_code == 404 and error_of(missing)["code"] == "not_found"
    method = http.delete("/v1/chat/completions")
    assert method.status_code == 405 and error_of(method)["code"] == "method_not_allowed"
    assert "POST" in method.headers["allow"]
    text = http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert text.status_code == 415 and error_of(text)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nonsense", b'{"a": NaN}', b"[" * 100_000, b'"\xff"'])
def test_bodies_that_are_no_objects(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize(("path", "kind"), [("/v1/chat/completions", "json"), ("/v1/files", "form")])
def test_too_large_by_its_own_word(server: ServerThread, path: str, kind: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    connection.putrequest("POST", path)
    connection.putheader("content-length", str(2**40))
    media = "application/json" if kind == "json" else "multipart/form-data; boundary=x"
    connection.putheader("content-type", media)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == "payload_too_large"
    connection.close()


def test_too_large_without_a_word(http: httpx.Client) -> None:
    chunk = b" " * 2**20
    stream = (chunk for _ in range(33))
    response = http.post("/v1/chat/completions", content=stream, headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    "text", ["", "plain", "Grüße 世界 👋🏽", "\x00\x07 tabs\tand\r\nlines", "<|im_end|> ﷽"]
)
def test_tokenizer_round_trip(http: httpx.Client, text: str) -> None:
    body = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == 256
    assert http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}


def test_tokenizer_of_messages_and_refusals(http: httpx.Client) -> None:
    assert http.post("/tokenize", json=CHAT).json()["tokens"] == TOKENIZER.encode_chat(CHAT["messages"])
    assert error_of(http.post("/tokenize", json={}))["param"] == "prompt"
    outside = http.post("/detokenize", json={"tokens": [MODEL.vocab_size]})
    assert outside.status_code == 400 and error_of(outside)["param"] == "tokens"
    assert error_of(http.post("/detokenize", json={"tokens": ["a"]}))["param"] == "tokens[0]"


# ------------------------------------------------------------------ completions


def complete(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/completions", json=body)


def test_completion_prompt_forms(http: httpx.Client, server: ServerThread) -> None:
    ids = TOKENIZER.encode("Hello there")
    for prompt, count in (("Hello there", 1), (["Hello there"] * 2, 2), (ids, 1), ([ids, ids[:1]], 2)):
        server.engine.requests.clear()
        body = complete(http, prompt=prompt, max_tokens=50).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(count))
        assert all(choice["text"] == DEFAULT_REPLY for choice in body["choices"])
        sent = sorted(add.prompt_token_ids for add in server.engine.requests)
        assert ids in sent and body["object"] == "text_completion"


def test_completion_echo_scores_the_prompt(http: httpx.Client) -> None:
    body = complete(http, prompt="Hello there", max_tokens=0, echo=True, logprobs=2).json()
    (choice,) = body["choices"]
    assert choice["text"] == "Hello there" and choice["finish_reason"] == "length"
    block = choice["logprobs"]
    assert block["token_logprobs"][0] is None and block["token_logprobs"][1:] == [-0.5] * (
        len(block["tokens"]) - 1
    )
    assert "".join(block["tokens"]) == "Hello there" and block["text_offset"][0] == 0
    assert body["usage"]["completion_tokens"] == 0


def test_completion_stream(http: httpx.Client) -> None:
    response = complete(http, prompt="Hi", max_tokens=50, stream=True, echo=True, logprobs=1)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hi" + DEFAULT_REPLY
    offsets = [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == sorted(offsets) and chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 256}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "guided_choice": ["x"]}, "guided_choice"),
    ],
)
def test_completion_refusals(http: httpx.Client, fields: dict, param: str) -> None:
    response = complete(http, **fields)
    assert response.status_code == 400 and error_of(response)["param"] == param


def test_ignore_eos_and_stop_token_ids(http: httpx.Client) -> None:
    body = complete(http, prompt="a", max_tokens=40, ignore_eos=True).json()
    assert body["usage"]["completion_tokens"] == 40 and body["choices"][0]["finish_reason"] == "length"
    last = TOKENIZER.encode(DEFAULT_REPLY)[-1]
    choice = complete(http, prompt="a", max_tokens=40, stop_token_ids=[last]).json()["choices"][0]
    assert choice["stop_reason"] == last and choice["text"] + TOKENIZER.token_text(last) == DEFAULT_REPLY


# ------------------------------------------------------------------ metrics


def test_gauges_of_the_engine_are_there_before_its_first_step(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "state")
    try:
        assert 'coserve_memory_bytes{owner="weights"} 5.0' in httpx.get(f"{server.url}/metrics").text
    finally:
        server.stop()


def test_metrics(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=CHAT)
    text = http.get("/metrics").text
    for name in (
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="coserve-demo"}',
        'vllm:num_requests_running{engine="0",model_name="coserve-demo"}',
        "vllm:lora_requests_info{",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:cache_config_info{",
        'coserve_finetune_jobs{status="running"}',
        'coserve_memory_bytes{owner="kv"}',
        "coserve_finetune_steps_total",
        "coserve_finetune_shared_tokens_total",
        'coserve_adapters{tier="device"}',
        "coserve_adapter_publish_seconds_count",
        'coserve_slo_missed_total{kind="ttft"}',
    ):
        assert name in text, name


# ------------------------------------------------------------------ keys


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys.toml"
    keys.write_text('[[keys]]\nkey = "tune-k"\nrole = "tune"\n[[keys]]\nkey = "watch-k"\nrole = "metrics"\n')
    server = ServerThread(
        folder / "state",
        api_keys=("chat-k",),
        admin_api_keys=("admin-k",),
        keys_file=str(keys),
        metrics_port=0,
    )
    yield server
    server.stop()


def test_open_routes(keyed: ServerThread) -> None:
    with keyed.http() as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_the_metrics_port_is_open_and_serves_nothing_else(keyed: ServerThread) -> None:
    root = f"http://127.0.0.1:{keyed.server.metrics_port}"
    with keyed.http() as client:
        assert "vllm:num_requests_running" in client.get(f"{root}/metrics").text
        assert client.get(f"{root}/v1/models").status_code == 404


# ------------------------------------------------------------------ draining


def test_drain(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "state")
    server.engine.hold.clear()
    body = {**CHAT, "stream": True}
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        wait_for(lambda: server.engine.requests)
        server.begin_stop()
        with server.http() as other:
            wait_for(lambda: other.get("/ready").status_code == 503)
            refused = other.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert error_of(refused)["code"] == "shutting_down"
            assert other.get("/health").status_code == 200
        server._loop.call_soon_threadsafe(server.engine.hold.set)
        text = "".join(answer.iter_text())
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in text
    server.stop()
