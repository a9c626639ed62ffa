"""/v1/chat/completions: shapes, order of chunks, tools, refusals."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.fake_engine import DEFAULT_REPLY, TOKENIZER
from tests.server.running import BASE, ServerThread, wait_for

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def chat(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": HELLO, **body})


def events(response: httpx.Response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_answer(http: httpx.Client, server: ServerThread) -> None:
    response = chat(http, model=BASE)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": DEFAULT_REPLY, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    prompt = TOKENIZER.encode_chat(HELLO)
    assert server.engine.requests[0].prompt_token_ids == prompt
    reply = len(TOKENIZER.encode(DEFAULT_REPLY)) + 1
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == reply
    assert body["usage"]["total_tokens"] == len(prompt) + reply
    assert server.engine.requests[0].sampling.max_tokens == 256 - len(prompt)


def test_stream_order(http: httpx.Client) -> None:
    response = chat(http, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == DEFAULT_REPLY and "�" not in text
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(c["usage"] is None for c in chunks[:-1])
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1


def test_continuous_usage(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counted = [
        c["usage"]["completion_tokens"] for c in events(chat(http, stream=True, stream_options=options))
    ]
    assert counted == sorted(counted) and counted[-1] == counted[-2] > 0


def test_stream_without_usage(http: httpx.Client) -> None:
    assert all("usage" not in chunk for chunk in events(chat(http, stream=True, stream_options={})))


def test_n_samples_have_their_own_seeds(http: httpx.Client, server: ServerThread) -> None:
    body = chat(http, n=3, seed=7).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(add.sampling.seed for add in server.engine.requests) == [7, 8, 9]
    prompt = len(TOKENIZER.encode_chat(HELLO))
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["completion_tokens"] == 3 * (len(TOKENIZER.encode(DEFAULT_REPLY)) + 1)
    chunks = events(chat(http, n=3, stream=True))
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_and_abort(http: httpx.Client, server: ServerThread, stream: bool) -> None:
    response = chat(http, stop=["世界", "never"], stream=stream)
    if stream:
        chunks = events(response)
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        assert choice["stop_reason"] == "世界"
    assert text == "Grüße, " and reason == "stop"
    wait_for(lambda: server.engine.aborted == [server.engine.requests[0].request_id])


def test_length(http: httpx.Client) -> None:
    body = chat(http, max_completion_tokens=2, max_tokens=50).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_logprobs(http: httpx.Client) -> None:
    choice = chat(http, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    raw = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
    assert raw.decode() == DEFAULT_REPLY
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(http: httpx.Client, server: ServerThread, stream: bool) -> None:
    server.engine.reply = CALL
    response = chat(http, tools=[TOOL], stream=stream)
    if stream:
        parts = [c["choices"][0] for c in events(response)]
        calls = [call for part in parts for call in part["delta"].get("tool_calls", [])]
        assert calls[0]["function"]["name"] == "weather" and calls[0]["id"].startswith("call_")
        arguments = "".join(call["function"].get("arguments", "") for call in calls)
        reason = parts[-1]["finish_reason"]
        assert all(not part["delta"].get("content") for part in parts)
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        arguments, reason = call["function"]["arguments"], choice["finish_reason"]
    assert json.loads(arguments) == {"city": "Köln"} and reason == "tool_calls"
    rendered = TOKENIZER.decode(server.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '"name": "weather"' in rendered


def test_tool_choice_none_hides_the_tools(http: httpx.Client, server: ServerThread) -> None:
    server.engine.reply = CALL
    choice = chat(http, tools=[TOOL], tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == CALL and "tool_calls" not in choice["message"]
    assert server.engine.requests[0].prompt_token_ids == TOKENIZER.encode_chat(HELLO)


@pytest.mark.parametrize("stream", [False, True])
def test_cut_tool_call_stays_length(http: httpx.Client, server: ServerThread, stream: bool) -> None:
    server.engine.reply = CALL
    response = chat(http, tools=[TOOL], max_tokens=4, stream=stream)
    choice = events(response)[-1]["choices"][0] if stream else response.json()["choices"][0]
    assert choice["finish_reason"] == "length"


REFUSED = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 500}, "max_tokens"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"suffix": "x"}, "suffix"),
    ({"functions": []}, "functions"),
    ({"cache_salt": "s" * 129}, "cache_salt"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"best_of": 4}, "best_of"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(fields)[:50] for fields, _ in REFUSED])
def test_refused_by_name(http: httpx.Client, server: ServerThread, fields: dict, param: str) -> None:
    response = chat(http, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert server.engine.requests == []


def test_accepted_without_effect(http: httpx.Client) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "unknown_thing": 1}
    assert chat(http, **fields, response_format={"type": "text"}).status_code == 200


def test_long_prompt_is_an_error(http: httpx.Client) -> None:
    response = chat(http, messages=[{"role": "user", "content": "word " * 500}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_model_is_never_the_base(http: httpx.Client, server: ServerThread) -> None:
    response = chat(http, model="nobody", stream=True)
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": response.json()["error"]["message"],
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert server.engine.requests == []


def test_continue_final_message(http: httpx.Client, server: ServerThread) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I say"}]
    body = chat(http, messages=messages, continue_final_message=True, echo=True).json()
    assert body["choices"][0]["message"]["content"] == "I say" + DEFAULT_REPLY
    text = TOKENIZER.decode(server.engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text.endswith("I say")


def test_failure_in_a_stream_is_an_event_and_done(http: httpx.Client, server: ServerThread) -> None:
    server.engine.fail_after = 3
    chunks = events(chat(http, stream=True))
    assert chunks[-1]["error"]["code"] == "service_unavailable"
    server.engine.fail_after = 0
    assert chat(http, stream=True).status_code == 503


def test_disconnect_aborts(server: ServerThread) -> None:
    server.engine.hold.clear()
    try:
        for stream in (True, False):
            server.engine.requests.clear()
            server.engine.aborted.clear()
            with server.http() as client, pytest.raises(httpx.ReadTimeout):
                client.post(
                    "/v1/chat/completions", json={"messages": HELLO, "stream": stream, "n": 2}, timeout=0.2
                )
            wait_for(lambda: len(server.engine.aborted) == len(server.engine.requests) == 2)
    finally:
        server.engine.hold.set()
