"""Requests made up by a machine: whatever comes, the answer is no 5xx, and an error has OpenAI's envelope.

`make test` runs a sample, `make test-all` ten thousand cases (`COSERVE_FUZZ` sets another number).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from coserve.server.app import all_routes
from coserve.server.application import request_fields
from tests.server.fake_engine import write_peft
from tests.server.running import BASE, ServerThread, wait_for
from tests.server.test_fine_tuning_http import DATA

CASES = int(os.environ.get("COSERVE_FUZZ", "10000"))
SAMPLE = 400
_IDS = ("file-none", "ftjob-none", "al", "al@1", "al@0", "prod", BASE, "..", "%00", "a/b", "")

numbers = st.one_of(
    st.integers(-3, 40), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -1, 0, 1e308, 0.5])
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", BASE, "al", "auto", "none", "json_schema", "function", "a" * 5000, "\x00", "😀", "<|end|>"]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_MESSAGES = [{"role": "user", "content": "Hi"}]
# A good body of each route that takes one; what is drawn is put into a place of it.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": _MESSAGES,
        "model": BASE,
        "max_tokens": 4,
        "tools": [_TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream_options": {},
        "stream": True,
        "logit_bias": {"5": 1},
    },
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4, "stop": ["x"], "logprobs": 1},
    "/v1/responses": {
        "input": _MESSAGES,
        "max_output_tokens": 4,
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    },
    "/v1/fine_tuning/jobs": {
        "model": BASE,
        "training_file": "FILE",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        "adapter": "fuzzed",
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 1},
        "publish_if": {"checks": [{"name": "c", "file": "FILE"}]},
        "metadata": {"a": "b"},
        "seed": 1,
    },
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "/nowhere", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
    "/v1/aliases/{alias}": {"model": BASE},
    "/v1/uploads": {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "text/jsonl"},
    "/v1/uploads/{id}/complete": {"part_ids": ["p"]},
    "/tokenize": {"prompt": "Hi", "messages": _MESSAGES, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2]},
}
_FIELDS = [field.name for field in (*request_fields.SHARED, *request_fields.CHAT, *request_fields.RESPONSES)]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(value[path[0]], path[1:], new)
    return copy


@st.composite
def bodies(draw: st.DrawFn, path: str, file: str) -> bytes:
    """A body for a route: a good one with some places changed, or nonsense."""
    good = BODIES.get(path)
    if good is None or draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.binary(max_size=60), values.map(_dump)))
    body = json.loads(json.dumps(good).replace("FILE", file))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()) and isinstance(body, dict):
            body[draw(st.one_of(st.sampled_from(_FIELDS), st.text(max_size=8)))] = draw(values)
        else:
            body = _put(body, draw(st.sampled_from(list(_places(body)))), draw(values))
    text = _dump(body)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 19)) == 0 else text


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")  # NaN and lone surrogates as Python writes them


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerThread, httpx.Client, str]]:
    """A server with an adapter, an alias and a file, its client, and the file's id."""
    root = tmp_path_factory.mktemp("fuzz")
    server = ServerThread(root / "state", adapter_roots=(str(root),))
    with server.http() as http:
        adapter = write_peft(root / "al", seed=1)
        assert http.post(
            "/v1/load_lora_adapter", json={"lora_name": "al", "lora_path": str(adapter)}
        ).is_success
        assert http.put("/v1/aliases/prod", json={"model": "al"}).is_success
        form = {"purpose": "fine-tune"}
        file = http.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data=form).json()["id"]
        yield server, http, file
    server.stop()


def check_one(data: st.DataObject, server: ServerThread, http: httpx.Client, file: str) -> None:
    """One made-up request, and what has to hold of its answer."""
    route = data.draw(st.sampled_from(all_routes(server.server.context)))
    path = route.path
    while "{" in path:
        before, _, rest = path.partition("{")
        word = data.draw(st.one_of(st.sampled_from([*_IDS, file]), st.text(max_size=12)))
        path = before + quote(word.encode("utf-8", "surrogatepass"), safe="") + rest.partition("}")[2]
    kinds = ("application/json", "application/json; charset=x", "text/plain", "multipart/form-data", "")
    headers = {
        "content-type": data.draw(st.sampled_from(kinds[:1] * 12 + kinds)),
        "x-request-id": data.draw(st.sampled_from(("id-1", "a b", "é", "x" * 300))).encode(),
    }
    query = data.draw(
        st.dictionaries(st.sampled_from(("limit", "after", "order", "purpose", "name", "x")), texts)
    )
    try:
        request = http.build_request(
            route.method, path, params=query, headers=headers, content=data.draw(bodies(route.path, file))
        )
    except (httpx.InvalidURL, UnicodeError):
        assume(False)
    answer = http.send(request)
    said = (
        f"{route.method} {request.url} {request.content[:500]!r} -> {answer.status_code} {answer.text[:500]}"
    )
    assert answer.status_code < 500, said
    # A head over its limit isn't read to its end, so its id isn't known.
    assert "x-request-id" in answer.headers or answer.status_code in (414, 431), said
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], said
        assert "Traceback" not in answer.text and str(server.config.state_dir) not in answer.text, said
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert '"code": "internal_error"' not in answer.text and '"server_error"' not in answer.text, said


_ANY_ORDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
_SETTINGS = settings(deadline=None, suppress_health_check=_ANY_ORDER, database=None)


@settings(_SETTINGS, max_examples=SAMPLE, derandomize=True)
@given(data=st.data())
def test_a_sample(fuzzed: tuple[ServerThread, httpx.Client, str], data: st.DataObject) -> None:
    check_one(data, *fuzzed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(_SETTINGS, max_examples=CASES)
@given(data=st.data())
def test_ten_thousand(fuzzed: tuple[ServerThread, httpx.Client, str], data: st.DataObject) -> None:
    check_one(data, *fuzzed)


def test_the_server_is_well_after_it(fuzzed: tuple[ServerThread, httpx.Client, str]) -> None:
    server, http, _ = fuzzed
    assert http.get("/ready").status_code == 200
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    wait_for(lambda: server.server.context.lifecycle.in_flight == 0)
