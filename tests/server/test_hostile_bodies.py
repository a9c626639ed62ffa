"""Whatever a body holds, the answer is an answer or a named refusal, never a fault."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.server.application.job_request import REQUEST_FIELDS
from coserve.server.application.lora_request import LORA_FIELDS
from coserve.server.application.request_fields import (
    KNOWN_CHAT,
    KNOWN_COMPLETIONS,
    OWN_RESPONSES,
    REFUSED,
    REFUSED_RESPONSES,
)
from coserve.server.application.training_request import TRAINING_FIELDS
from coserve.server.grpc_gen import fine_tuning_pb2, fine_tuning_pb2_grpc
from tests.server.running import BASE, ServerThread

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["", "a", "auto", "none", BASE, "é👋", "\x00", "x" * 300, "ftjob-1", "a@1", "@", "../x"]
    )
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "function", "5", "r"]), inner
        )
    ),
    max_leaves=6,
)
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
BODIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/v1/chat/completions": (CHAT, sorted(KNOWN_CHAT | REFUSED.keys())),
    "/v1/completions": ({"prompt": "Hi", "max_tokens": 2}, sorted(KNOWN_COMPLETIONS | REFUSED.keys())),
    "/v1/responses": (
        {"input": "Hi", "max_output_tokens": 2},
        sorted(KNOWN_CHAT | OWN_RESPONSES | REFUSED_RESPONSES.keys() | REFUSED.keys()),
    ),
    "/v1/fine_tuning/jobs": (
        {"model": BASE, "training_file": "file-x"},
        sorted(REQUEST_FIELDS | {"hyperparameters", "integrations"}),
    ),
    "/v1/uploads": (
        {"bytes": 5, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"},
        ["bytes", "filename", "mime_type", "purpose", "expires_after"],
    ),
    "/v1/uploads/upload_none/complete": ({"part_ids": ["part_1"]}, ["part_ids", "md5"]),
    "/tokenize": ({"prompt": "x"}, ["prompt", "messages", "model", "tools", "add_special_tokens"]),
    "/detokenize": ({"tokens": [1]}, ["tokens", "model"]),
    "/v1/load_lora_adapter": (
        {"lora_name": "n", "lora_path": "/p"},
        ["lora_name", "lora_path", "load_inplace"],
    ),
    "/v1/unload_lora_adapter": ({"lora_name": "n"}, ["lora_name"]),
    "/load_lora_adapter": ({"lora_name": "n", "lora_path": "/p"}, ["lora_name", "lora_path", "pinned"]),
    "/unload_lora_adapter": ({"lora_name": "n"}, ["lora_name"]),
}
QUICK = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), (response.status_code, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["message"]


LONG = {
    "words": "hello world " * 500_000,
    "one word": "a" * 6_000_000,
    "spaces": " " * 6_000_000,
    "many tokens": "世界" * 300_000,
}


@pytest.mark.parametrize("kind", list(LONG))
def test_texts_far_over_any_context_are_not_read(
    server: ServerThread, http: httpx.Client, kind: str
) -> None:
    """Read to their end they'd take minutes and gigabytes, one at a time: nobody else's would be read."""
    text = LONG[kind]
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", {"input": text}),
        ("/tokenize", {"prompt": text}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400, answer.text[:200]
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    again = {"prompt": "Hi", "stop_token_ids": [5] * 100_000, "allowed_token_ids": [5, 6] * 100_000}
    server.engine.requests.clear()
    assert http.post("/v1/completions", json=again | {"max_tokens": 2}).status_code == 200
    sampling = server.engine.requests[0].sampling
    assert (sampling.stop_token_ids, sampling.allowed_token_ids) == ((5,), (5, 6))
    fits = "hello world " * 10_000
    assert http.post("/tokenize", json={"prompt": fits}).json()["count"] > 20_000


def test_rows_far_over_any_context(server: ServerThread) -> None:
    """A line of sixteen megabytes is refused by its number, whatever it holds."""
    text = "a" * 6_000_000
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Ho"}]},
        {"prompt": text, "completion": "Ho"},
        {"text": text},
    ]
    with server.channel() as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        for row in rows:
            data = json.dumps(row).encode() + b"\n"
            with pytest.raises(grpc.RpcError) as refusal:
                stub.PreviewDataset(fine_tuning_pb2.PreviewDatasetRequest(data=data))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "line 1" in refusal.value.details() and "100000 tokens" in refusal.value.details()


@pytest.mark.parametrize("path", list(BODIES))
@QUICK
@given(data=st.data())
def test_fields_of_any_kind(server: ServerThread, http: httpx.Client, path: str, data: st.DataObject) -> None:
    base, names = BODIES[path]
    changed = data.draw(st.dictionaries(st.sampled_from(names), JSON, min_size=1, max_size=3))
    check(http.post(path, json={**base, **changed}))


@pytest.mark.parametrize("part", ["lora", "training"])
@QUICK
@given(data=st.data())
def test_job_settings_of_any_kind(http: httpx.Client, part: str, data: st.DataObject) -> None:
    names = sorted(LORA_FIELDS if part == "lora" else TRAINING_FIELDS)
    settings_ = data.draw(st.dictionaries(st.sampled_from(names), JSON, min_size=1, max_size=3))
    check(http.post("/v1/fine_tuning/jobs", json={"training_file": "file-x", part: settings_}))


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/files/", "/v1/fine_tuning/jobs/", "/v1/adapters/"])
@pytest.mark.parametrize(
    "name", ["%00", "%2F", "..%2f..%2fetc", "a" * 3000, "%F0%9F%91%8B", "@", "a@-1", "a@²"]
)
def test_names_of_any_kind(http: httpx.Client, path: str, name: str) -> None:
    response = http.get(path + name)
    assert response.status_code in (400, 404), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


WORDS = st.sampled_from(
    [
        "message",
        "function_call",
        "function_call_output",
        "reasoning",
        "user",
        "assistant",
        "system",
        "developer",
    ]
    + [
        "input_text",
        "output_text",
        "refusal",
        "text",
        "json_schema",
        "function",
        "allowed_tools",
        "f",
        "auto",
    ]
)
NAMES = [
    "type",
    "role",
    "content",
    "text",
    "output",
    "call_id",
    "name",
    "arguments",
    "parameters",
    "strict",
    "mode",
] + ["format", "schema", "tools", "refusal", "summary", "id", "description"]
ITEMS = st.recursive(
    WORDS | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), WORDS | inner, max_size=6)
    ),
    max_leaves=12,
)


@settings(QUICK, max_examples=40)
@given(fields=st.dictionaries(st.sampled_from(["input", "tools", "tool_choice", "text"]), ITEMS, min_size=1))
def test_items_of_any_kind(server: ServerThread, http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2, **fields})
    check(answer)
    if answer.status_code == 200:
        assert http.get(f"/v1/responses/{answer.json()['id']}/input_items").json()["data"]
