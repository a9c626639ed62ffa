"""Every operation that OpenAI's own description has, and every route of ours: answers, chunks, errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from coserve.server.app import all_routes
from tests.server.openai_schema import Schemas, schemas
from tests.server.running import BASE, ServerThread
from tests.server.test_fine_tuning_http import DATA, until_over

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
FORM = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}


def test_the_checker_finds_what_is_wrong() -> None:
    good = {"id": "e", "object": "fine_tuning.job.event", "created_at": 1, "level": "info", "message": ""}
    schemas().check("FineTuningJobEvent", good)
    for bad in ({"level": "loud"}, {"created_at": "now"}, {"data": 5}, {"created_at": True}):
        with pytest.raises(AssertionError):
            schemas().check("FineTuningJobEvent", {**good, **bad})
    with pytest.raises(AssertionError, match="'message' is a required property"):
        schemas().check("FineTuningJobEvent", {k: v for k, v in good.items() if k != "message"})
    with pytest.raises(AssertionError, match=r"GET /models/\{model\}: .*'object' is a required"):
        schemas().check_answer("GET", "/models/{model}", {"id": "x", "created": 1, "owned_by": "y"})


# ------------------------------------------------------------------ every operation


class World(NamedTuple):
    """A server's client, and ids of what is there: a job that is over, two that run, one that is paused."""

    http: httpx.Client
    file: str
    done: str
    running: str
    to_cancel: str
    paused: str

    @property
    def model(self) -> str:
        return str(self.http.get(f"/v1/fine_tuning/jobs/{self.done}").json()["fine_tuned_model"])


def upload(http: httpx.Client) -> str:
    return str(http.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data=FORM).json()["id"])


def start(http: httpx.Client, **body: Any) -> str:
    auto = {"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": "auto"}
    job = {
        "model": BASE,
        "training_file": upload(http),
        "suffix": "x",
        "metadata": {"a": "b"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": auto}},
    }
    schemas().check_request("POST", "/fine_tuning/jobs", job)
    return str(http.post("/v1/fine_tuning/jobs", json={**job, **body}).json()["id"])


@pytest.fixture(scope="module")
def world(module_server: ServerThread) -> Iterator[World]:
    with module_server.http() as http:
        module_server.engine.auto_train = True
        done = start(http)
        assert until_over(module_server.openai(), done).status == "succeeded"
        module_server.engine.auto_train = False
        running, cancelled, paused = start(http), start(http), start(http)
        http.post(f"/v1/fine_tuning/jobs/{paused}/pause")
        yield World(http, upload(http), done, running, cancelled, paused)


Action = Callable[[World], httpx.Response]
_JOBS = "/v1/fine_tuning/jobs"
OPERATIONS: dict[tuple[str, str], Action] = {
    ("POST", "/chat/completions"): lambda w: w.http.post("/v1/chat/completions", json={"messages": HELLO}),
    ("POST", "/completions"): lambda w: w.http.post("/v1/completions", json={"prompt": "Hi"}),
    ("GET", "/files"): lambda w: w.http.get("/v1/files"),
    ("POST", "/files"): lambda w: w.http.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data=FORM),
    ("GET", "/files/{file_id}"): lambda w: w.http.get(f"/v1/files/{w.file}"),
    ("DELETE", "/files/{file_id}"): lambda w: w.http.delete(f"/v1/files/{upload(w.http)}"),
    ("GET", "/models"): lambda w: w.http.get("/v1/models"),
    ("GET", "/models/{model}"): lambda w: w.http.get(f"/v1/models/{w.model}"),
    ("POST", "/fine_tuning/jobs"): lambda w: w.http.post(
        _JOBS, json={"model": BASE, "training_file": w.file}
    ),
    ("GET", "/fine_tuning/jobs"): lambda w: w.http.get(_JOBS),
    ("GET", "/fine_tuning/jobs/{fine_tuning_job_id}"): lambda w: w.http.get(f"{_JOBS}/{w.done}"),
    ("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/cancel"): lambda w: w.http.post(
        f"{_JOBS}/{w.to_cancel}/cancel"
    ),
    ("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/pause"): lambda w: w.http.post(
        f"{_JOBS}/{w.running}/pause"
    ),
    ("POST", "/fine_tuning/jobs/{fine_tuning_job_id}/resume"): lambda w: w.http.post(
        f"{_JOBS}/{w.paused}/resume"
    ),
    ("GET", "/fine_tuning/jobs/{fine_tuning_job_id}/events"): lambda w: w.http.get(
        f"{_JOBS}/{w.done}/events"
    ),
    ("GET", "/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints"): lambda w: w.http.get(
        f"{_JOBS}/{w.done}/checkpoints"
    ),
    ("DELETE", "/models/{model}"): lambda w: w.http.delete(f"/v1/models/{w.model}"),  # for good
}
_PERMISSIONS = "/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"
REFUSED = {
    ("POST", "/embeddings"): "Embeddings",
    ("GET", "/chat/completions"): "/v1/responses",
    ("GET", "/chat/completions/{completion_id}"): "/v1/responses",
    ("POST", "/chat/completions/{completion_id}"): "/v1/responses",
    ("DELETE", "/chat/completions/{completion_id}"): "/v1/responses",
    ("GET", "/chat/completions/{completion_id}/messages"): "/v1/responses",
    ("GET", _PERMISSIONS): "permissions",
    ("POST", _PERMISSIONS): "permissions",
    ("DELETE", _PERMISSIONS + "/{permission_id}"): "permissions",
    ("POST", "/fine_tuning/alpha/graders/run"): "Graders",
    ("POST", "/fine_tuning/alpha/graders/validate"): "Graders",
}
RAW = {("GET", "/files/{file_id}/content")}  # not JSON: tests/server/test_fine_tuning_http.py compares bytes


def test_every_operation_is_accounted_for() -> None:
    assert set(schemas().operations) == OPERATIONS.keys() | REFUSED.keys() | RAW


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_an_operation_answers_as_described(world: World, operation: tuple[str, str]) -> None:
    answer = OPERATIONS[operation](world)
    assert answer.status_code == 200, answer.text
    # The file has an operation that pauses a job, and no word for what it makes of it.
    known = answer.text.replace('"status":"paused"', '"status":"running"')
    assert known != answer.text or not operation[1].endswith("/pause")
    schemas().check_answer(*operation, json.loads(known))


@pytest.mark.parametrize("operation", REFUSED, ids=" ".join)
def test_what_this_server_has_not_is_refused_by_name(http: httpx.Client, operation: tuple[str, str]) -> None:
    method, path = operation
    answer = http.request(method, "/v1" + path.replace("{", "").replace("}", ""), json={})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "unsupported" and REFUSED[operation] in error["message"]
    schemas().check("ErrorResponse", answer.json())


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_jobs_that_came_to_nothing(server: ServerThread, http: httpx.Client, outcome: str) -> None:
    server.engine.auto_train = False
    if outcome == "failed":
        bad = http.post("/v1/files", files={"file": ("a.jsonl", b"nonsense")}, data=FORM).json()["id"]
        job = start(http, training_file=bad)
    else:
        job = start(http)
        schemas().check("FineTuningJob", http.post(f"{_JOBS}/{job}/cancel").json())
    assert until_over(server.openai(), job).status == outcome
    schemas().check("FineTuningJob", http.get(f"{_JOBS}/{job}").json())
    events = http.get(f"{_JOBS}/{job}/events").json()
    schemas().check("ListFineTuningJobEventsResponse", events)
    assert events["data"]


# ------------------------------------------------------------------ answers and chunks

USAGE = {"include_usage": True, "include_obfuscation": True}
CHATS: list[dict[str, Any]] = [
    {"n": 3, "seed": 5},
    {"logprobs": True, "top_logprobs": 3},
    {"tools": [TOOL], "tool_choice": "auto"},
    {"max_completion_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}},
    {"service_tier": "flex", "metadata": {"a": "b"}, "user": "u"},
    {"temperature": 0, "top_p": 0.5, "frequency_penalty": 1, "presence_penalty": 1},
]


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("fields", CHATS, ids=lambda fields: ",".join(fields))
def test_chat(http: httpx.Client, server: ServerThread, fields: dict[str, Any]) -> None:
    server.engine.reply = CALL if "tools" in fields else server.engine.reply
    body = {"model": BASE, "messages": HELLO, **fields}
    schemas().check_request("POST", "/chat/completions", body)
    answer = http.post("/v1/chat/completions", json=body).json()
    schemas().check("CreateChatCompletionResponse", answer)
    for options in (None, {}, USAGE):
        streamed = {**body, "stream": True, "stream_options": options}
        schemas().check_request("POST", "/chat/completions", streamed)
        for chunk in chunks_of(http.post("/v1/chat/completions", json=streamed)):
            schemas().check("CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"logprobs": 3}, {"prompt": ["a", "b"]}, {"prompt": [[5, 6], [7]]}, {"echo": True}],
    ids=lambda fields: ",".join(fields),
)
def test_completions(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 40, **fields}
    schemas().check_request("POST", "/completions", body)
    schemas().check("CreateCompletionResponse", http.post("/v1/completions", json=body).json())
    for chunk in chunks_of(http.post("/v1/completions", json={**body, "stream": True})):
        if chunk["choices"][0]["finish_reason"] is None:  # the file forgets that chunks go before the end
            chunk["choices"][0]["finish_reason"] = "stop"
        schemas().check("CreateCompletionResponse", chunk)


def test_an_error_in_a_stream(http: httpx.Client, server: ServerThread) -> None:
    """vllm#52852: after the first chunk an error is an event of its own, and [DONE] follows."""
    server.engine.fail_after = 3
    *_, last = chunks_of(http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}))
    schemas().check("ErrorResponse", last)


# ------------------------------------------------------------------ every route

OWN_ENVELOPE = "/api/v1/"  # another API's, with errors of its own
BODIES: list[dict[str, Any]] = [
    {},
    {"json": []},
    {"json": {}},
    {
        "json": {
            "model": "nobody",
            "messages": HELLO,
            "prompt": "x",
            "input": "x",
            "training_file": "file-none",
        }
    },
    {"content": b"{", "headers": {"content-type": "application/json"}},
    {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}},
]


def check_error(answer: httpx.Response) -> None:
    where = f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:200]}"
    assert answer.status_code < 500, where
    assert answer.headers["x-request-id"], where
    if answer.status_code < 400:
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], where


def test_every_route_refuses_in_the_envelope(server: ServerThread, http: httpx.Client) -> None:
    routes = [r for r in all_routes(server.server.context) if not r.path.startswith(OWN_ENVELOPE)]
    assert len(routes) >= 45
    refused: set[tuple[str, str]] = set()
    for route in routes:
        path = route.path.replace(":path", "").replace("{", "no-").replace("}", "")
        for body in BODIES if route.method in ("POST", "PUT") else ({},):
            answer = http.request(route.method, path, **body)
            check_error(answer)
            if answer.status_code >= 400:
                refused.add((route.method, route.path))
    takes_anything = {r.path for r in routes if (r.method, r.path) not in refused and r.method != "GET"}
    assert takes_anything <= {"/ping"}
    for path in {route.path for route in routes}:
        wrong = http.request("PATCH", path.replace(":path", "").replace("{", "no-").replace("}", ""))
        assert wrong.status_code == 405 and wrong.headers["allow"], path
        check_error(wrong)


def test_errors_are_as_described(http: httpx.Client) -> None:
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/fine_tuning/jobs",
        "/v1/uploads",
    ):
        schemas().check("ErrorResponse", http.post(path, json={"temperature": "hot"}).json())
    for path in ("/v1/models/x", "/v1/files/x", "/v1/fine_tuning/jobs/x", "/v1/responses/x", "/v1/nowhere"):
        schemas().check("ErrorResponse", http.get(path).json())


def test_what_is_skipped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file the rest of this module skips, and each skip tells what it needs."""
    assert isinstance(schemas(), Schemas)
    schemas.cache_clear()
    monkeypatch.setattr("tests.server.openai_schema.FILE", Path("/nowhere"))
    with pytest.raises(pytest.skip.Exception, match="not beside the checkout"):
        schemas()
    schemas.cache_clear()
