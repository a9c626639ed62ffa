"""Upstream defects of streams and of fields that were dropped in silence."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.running import ServerThread

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1234567}}</tool_call>'


def lines(answer: httpx.Response) -> list[str]:
    """What stands behind `data: `, in order."""
    assert answer.status_code == 200, answer.text
    return [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]


def post(http: httpx.Client, path: str, **fields: object) -> httpx.Response:
    subject = {"messages": MESSAGES} if "chat" in path else {"prompt": "Hi"}
    return http.post(path, json={**subject, **fields})


PATHS = ["/v1/chat/completions", "/v1/completions"]


@pytest.mark.parametrize("path", PATHS)
def test_usage_comes_when_it_is_asked_for_and_once(http: httpx.Client, path: str) -> None:
    """vllm#7262: `stream_options: {}` brought usage, or an error. vllm#36379: include_usage brought more than
    one chunk with it, or none."""
    for options in ({}, {"include_usage": False}, None):
        found = [
            json.loads(line) for line in lines(post(http, path, stream=True, stream_options=options))[:-1]
        ]
        assert found and not any(chunk.get("usage") for chunk in found)
    *chunks, done = lines(post(http, path, stream=True, stream_options={"include_usage": True}))
    found = [json.loads(chunk) for chunk in chunks]
    assert [chunk["choices"] for chunk in found if chunk.get("usage")] == [[]]
    assert found[-1]["usage"]["completion_tokens"] > 0 and done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_tool_call_ends_by_length(http: httpx.Client, server: ServerThread, stream: bool) -> None:
    """vllm#53269: a tool call that max_tokens had cut ended as "tool_calls", with half its arguments."""
    server.engine.reply = CALL
    for cut in (4, 12, 20):
        answer = post(http, PATHS[0], tools=[TOOL], max_tokens=cut, stream=stream)
        if stream:
            last = [json.loads(line) for line in lines(answer)[:-1] if json.loads(line)["choices"]][-1]
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_a_failure_is_told_before_and_after_the_first_token(
    http: httpx.Client, server: ServerThread, path: str, n: int
) -> None:
    """vllm#52852: a stream that failed ended without a word. vllm#40986: one that failed before its first
    token was a good answer with an error in it. Here the status tells of that."""
    server.engine.fail_after = 3
    *chunks, last, done = lines(post(http, path, stream=True, n=n))
    assert chunks and done == "[DONE]"
    error = json.loads(last)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "service_unavailable"
    assert not any("error" in json.loads(chunk) for chunk in chunks)
    server.engine.fail_after = 0
    refused = post(http, path, stream=True, n=n)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "field", ["json", "regex", "choice", "grammar", "decoding_backend", "whitespace_pattern"]
)
def test_fields_that_were_taken_away_are_not_dropped(http: httpx.Client, path: str, field: str) -> None:
    """vllm#53975: guided_* was accepted, and the text unconstrained."""
    refused = post(http, path, **{f"guided_{field}": "a"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == f"guided_{field}"
