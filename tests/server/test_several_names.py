"""A base model of several names, and what else a vLLM command line sets for every request."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from coserve.config import DEMO_MODEL_DIR, EngineConfig
from coserve.errors import ConfigError
from tests.server.fake_engine import DEFAULT_REPLY, write_peft
from tests.server.running import ServerThread
from tests.server.test_adapters_http import chat, load


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    root = tmp_path_factory.mktemp("named")
    (root / "defaults").mkdir()
    (root / "defaults" / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "top_k": 7}))
    server = ServerThread(
        root / "state",
        engine=EngineConfig(model="", served_model_name="chat"),
        served_model_names=("chat-latest", "chat/eu"),
        generation_config=str(root / "defaults"),
        force_include_usage=True,
        sse_keep_alive_interval=0.02,
        adapter_roots=(str(root),),
    )
    yield server
    server.stop()


@pytest.fixture
def http(named: ServerThread) -> Iterator[httpx.Client]:
    with named.http() as client:
        yield client


def test_every_name_answers_and_the_first_is_told(named: ServerThread, http: httpx.Client) -> None:
    for name in ("chat", "chat-latest", "chat/eu"):
        assert chat(http, name).json()["model"] == "chat"
        card = http.get(f"/v1/models/{name}").json()
        assert (card["id"], card["parent"]) == (name, None)
    listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert listed == ["chat", "chat-latest", "chat/eu"]
    assert chat(http, "coserve-demo").status_code == 404
    sampling = named.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k) == (0.25, 7)
    assert http.post("/tokenize", json={"model": "chat/eu", "prompt": "Hi"}).status_code == 200


def test_no_adapter_takes_one_of_them(named: ServerThread, http: httpx.Client) -> None:
    root = Path(named.config.adapter_roots[0])
    refused = load(http, "chat-latest", write_peft(root / "x"))
    assert refused.status_code == 400 and "base model" in refused.json()["error"]["message"]
    assert http.delete("/v1/models/chat-latest").json()["error"]["message"].startswith("The base model")


def test_every_stream_ends_with_its_usage(http: httpx.Client) -> None:
    for path, prompt in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ):
        lines = http.post(path, json={"stream": True, "max_tokens": 4, **prompt}).text.split("\n\n")
        last = json.loads(lines[-3].removeprefix("data: "))
        assert lines[-2] == "data: [DONE]" and last["choices"] == [] and last["usage"]["prompt_tokens"] > 0


def test_a_silent_stream_is_kept_alive(named: ServerThread, http: httpx.Client) -> None:
    hold = named.engine.hold
    named.call(_set(hold, False))
    body = {"stream": True, "prompt": "Hi", "max_tokens": 60}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert [line for line in (next(lines) for _ in range(5)) if line] == [": keep-alive"] * 2
        named.call(_set(hold, True))
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    client = named.openai()
    chunks = client.completions.create(model="chat", **body)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == DEFAULT_REPLY


async def _set(event: asyncio.Event, is_set: bool) -> None:
    event.set() if is_set else event.clear()


def test_what_is_under_way(http: httpx.Client) -> None:
    assert http.get("/load").json() == {"server_load": 0}


def test_another_directorys_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL_DIR / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    server = ServerThread(tmp_path / "state", engine=EngineConfig(model="", tokenizer=str(folder)))
    with server.http() as http:
        chat(http, "coserve-demo")
        asked = server.engine.requests[-1].prompt_token_ids
        assert http.post("/detokenize", json={"tokens": asked}).json()["prompt"] == "<Hi>"
    server.stop()


def test_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(DEMO_MODEL_DIR / "tokenizer_config.json", folder)
    tokenizer = json.loads((DEMO_MODEL_DIR / "tokenizer.json").read_text())
    more = {"id": 10**6, "content": "<far>", "special": True, "single_word": False, "lstrip": False}
    tokenizer["added_tokens"].append({**more, "rstrip": False, "normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"--tokenizer: it has token ids up to"):
        ServerThread(tmp_path / "state", engine=EngineConfig(model="", tokenizer=str(folder)))
