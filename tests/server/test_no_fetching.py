"""No address in a request is ever fetched: a server that listens there hears nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import llguidance
import pytest

from coserve.server.grpc_gen import adapters_pb2 as pba
from coserve.server.grpc_gen import adapters_pb2_grpc
from tests.server.running import BASE, ServerThread


class Canary:
    """Listens, and counts who comes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/x"
        self.visits = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                visitor, _ = self.listener.accept()
            except OSError:
                return
            self.visits += 1
            visitor.close()


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    made = Canary()
    yield made
    made.listener.close()


def requests(url: str) -> list[tuple[str, dict[str, Any], int]]:
    """(path, body, the answer's status): 200 where the address is text like any other, 0 where an engine that
    compiles grammars would say."""
    said = {"role": "user", "content": "Hi"}
    chat: dict[str, Any] = {"messages": [said], "max_tokens": 2}

    def part(kind: str, value: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}]}

    def given(kind: str, **value: Any) -> dict[str, Any]:
        return {"input": [{"role": "user", "content": [{"type": kind, **value}]}]}

    schema = {"type": "object", "properties": {"a": {"$ref": url}}, "$schema": url, "$id": url}
    formatted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    job = {"training_file": "file-none"}
    return [
        ("/v1/chat/completions", part("image_url", {"url": url}), 400),
        ("/v1/chat/completions", part("image_url", url), 400),
        ("/v1/chat/completions", part("video_url", {"url": url}), 400),
        ("/v1/chat/completions", part("audio_url", {"url": url}), 400),
        ("/v1/chat/completions", part("input_audio", {"data": url, "format": "wav"}), 400),
        ("/v1/chat/completions", part("file", {"file_data": url, "file_id": url}), 400),
        ("/v1/chat/completions", chat | {"response_format": formatted}, 0),
        ("/v1/chat/completions", chat | {"structured_outputs": {"json": schema}}, 0),
        ("/v1/chat/completions", chat | {"model": url}, 404),
        ("/v1/chat/completions", chat | {"model": "owner/name"}, 404),
        ("/v1/chat/completions", chat | {"web_search_options": {"url": url}}, 400),
        ("/v1/chat/completions", chat | {"chat_template": f"{{% include '{url}' %}}"}, 400),
        ("/v1/chat/completions", {"messages": [said | {"content": url}], "max_tokens": 2}, 200),
        ("/v1/chat/completions", chat | {"documents": [{"title": "t", "text": url, "url": url}]}, 400),
        ("/v1/chat/completions", chat | {"metadata": {"callback": url}, "webhook": url}, 200),
        ("/v1/responses", given("input_image", image_url=url), 400),
        ("/v1/responses", given("input_file", file_url=url), 400),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "mcp", "server_url": url}]}, 400),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "web_search"}]}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "n", "lora_path": url}, 400),
        ("/v1/load_lora_adapter", {"lora_name": "n", "lora_path": "owner/name"}, 400),
        ("/v1/fine_tuning/jobs", job | {"training_file": url}, 404),
        ("/v1/fine_tuning/jobs", job | {"model": "owner/name"}, 404),
        ("/v1/fine_tuning/jobs", job | {"init_from": url}, 404),
        ("/v1/fine_tuning/jobs", job | {"integrations": [{"type": "wandb", "wandb": {"project": url}}]}, 400),
        ("/v1/completions", {"prompt": url, "max_tokens": 2, "tools": [tool]}, 200),
    ]  # fmt: skip


@pytest.mark.parametrize("place", range(len(requests(""))))
def test_no_address_is_fetched(http: httpx.Client, canary: Canary, place: int) -> None:
    path, body, status = requests(canary.url)[place]
    answer = http.post(path, json={"model": BASE} | body if path != "/v1/load_lora_adapter" else body)
    assert answer.status_code == status or not status, answer.text
    if answer.status_code != 200:
        assert json.loads(answer.text)["error"]["message"]
    time.sleep(0.01)
    assert canary.visits == 0


def test_nor_over_grpc(server: ServerThread, canary: Canary) -> None:
    with server.channel() as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        for path in (canary.url, "owner/name", canary.url.replace("http", "file")):
            with pytest.raises(grpc.RpcError) as refusal:
                stub.LoadAdapter(pba.LoadAdapterRequest(name="n", path=path))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert canary.visits == 0


def test_nor_by_what_compiles_schemas(canary: Canary) -> None:
    for schema in ({"$ref": canary.url}, {"properties": {"a": {"$ref": f"{canary.url}#/b"}}}):
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        assert "does not fetch" in llguidance.LLMatcher.validate_grammar(grammar)
    assert canary.visits == 0


def test_the_canary_hears(canary: Canary) -> None:
    """What the tests above rely on."""
    before = canary.visits
    socket.create_connection(canary.listener.getsockname()).close()
    deadline = time.monotonic() + 5
    while canary.visits == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert canary.visits == before + 1
    canary.visits = 0
