"""Every field of a request to generate: a value and what it does, and a value that is refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import pytest

from coserve.config import EngineConfig
from coserve.engine.messages import AddRequest
from coserve.server.application.request_fields import (
    CHAT,
    COMPLETIONS,
    KNOWN_CHAT,
    KNOWN_COMPLETIONS,
    REFUSED,
    SHARED,
)
from tests.server.fake_engine import DEFAULT_REPLY, EOS, TOKENIZER
from tests.server.running import BASE, ServerThread

HELLO = [{"role": "user", "content": "Hello"}]
PARTS = [{"type": "text", "text": "Hi"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "I say"}]
PROMPT = "Hello there"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
REPLY_IDS = TOKENIZER.encode(DEFAULT_REPLY, add_special_tokens=False)
ROUTES = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "completions": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 64}),
}


class Seen(NamedTuple):
    """What came of a request: the answer, its stream's chunks, and what the engine got."""

    body: dict[str, Any]
    chunks: list[dict[str, Any]]
    sent: list[AddRequest]
    headers: httpx.Headers

    @property
    def choice(self) -> dict[str, Any]:
        return self.body["choices"][0]

    @property
    def text(self) -> str:
        return self.choice["text"] if "text" in self.choice else self.choice["message"]["content"]

    def sampling(self, name: str) -> Any:
        return getattr(self.sent[0].sampling, name)


class Case(NamedTuple):
    """`good` with `does` true of what is seen; `bad`, and the error's `param`."""

    name: str
    good: dict[str, Any]
    does: Callable[[Seen], bool]
    bad: dict[str, Any]
    param: str


def sampled(name: str, value: Any, bad: Any, expected: Any = None, param: str = "") -> Case:
    """A field that reaches the engine under its own name."""
    wanted = value if expected is None else expected
    return Case(name, {name: value}, lambda seen: seen.sampling(name) == wanted, {name: bad}, param or name)


def without_effect(name: str, value: Any, bad: Any) -> Case:
    return Case(name, {name: value}, lambda seen: seen.text == DEFAULT_REPLY, {name: bad}, name)


BOTH = [
    Case("model", {"model": BASE}, lambda seen: seen.body["model"] == BASE, {"model": 5}, "model"),
    sampled("max_tokens", 3, 0),
    Case(
        "max_completion_tokens",
        {"max_completion_tokens": 2, "max_tokens": 50},
        lambda seen: seen.sampling("max_tokens") == 2 and seen.choice["finish_reason"] == "length",
        {"max_completion_tokens": 0},
        "max_completion_tokens",
    ),
    sampled("temperature", 0.5, 2.5),
    sampled("top_p", 0.5, 0),
    sampled("frequency_penalty", -2, 2.1),
    sampled("presence_penalty", 2, -2.1),
    Case("n", {"n": 128}, lambda seen: len(seen.body["choices"]) == 128, {"n": 129}, "n"),
    Case("stop", {"stop": ["世"]}, lambda seen: seen.text == "Grüße, ", {"stop": ["a"] * 17}, "stop"),
    sampled("seed", 7, 2**63),
    sampled("logit_bias", {"5": -100}, {"5": 101}, {5: -100.0}, "logit_bias.5"),
    Case(
        "response_format",
        {"response_format": {"type": "json_object"}},
        lambda seen: '{"type":"object"' in seen.sampling("grammar"),
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
    ),
    Case(
        "structured_outputs",
        {"structured_outputs": {"choice": ["yes", "no"]}},
        lambda seen: '"yes" | "no"' in seen.sampling("grammar"),
        {"structured_outputs": {"choice": []}},
        "structured_outputs.choice",
    ),
    Case("stream", {"stream": True}, lambda seen: len(seen.chunks) > 2, {"stream": "yes"}, "stream"),
    Case(
        "stream_options",
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}},
        lambda seen: (
            [c["usage"] is None for c in seen.chunks] == [True] * (len(seen.chunks) - 1) + [False]
            and all("obfuscation" in c for c in seen.chunks[:-1])
            and seen.chunks[-1]["choices"] == []
        ),
        {"stream_options": {"include_usage": True}},
        "stream_options",
    ),
    Case(
        "service_tier",
        {"service_tier": "flex"},
        lambda seen: seen.body["service_tier"] == "flex" and seen.sent[0].priority == 1,
        {"service_tier": "gold"},
        "service_tier",
    ),
    sampled("top_k", 5, -2),
    sampled("min_p", 0.25, 1.5),
    sampled("repetition_penalty", 1.5, 0),
    without_effect("length_penalty", 1.0, 0.5),
    sampled("min_tokens", 4, -1),
    Case(
        "stop_token_ids",
        {"stop_token_ids": [REPLY_IDS[-1]]},
        lambda seen: seen.choice["stop_reason"] == REPLY_IDS[-1] and seen.text + "." == DEFAULT_REPLY,
        {"stop_token_ids": [10**6]},
        "stop_token_ids",
    ),
    sampled("ignore_eos", True, 1),
    Case(
        "include_stop_str_in_output",
        {"stop": "世", "include_stop_str_in_output": True},
        lambda seen: seen.text == "Grüße, 世",
        {"include_stop_str_in_output": "no"},
        "include_stop_str_in_output",
    ),
    Case(
        "skip_special_tokens",
        {"skip_special_tokens": False, "include_stop_str_in_output": True},
        lambda seen: seen.text == DEFAULT_REPLY + TOKENIZER.token_text(EOS),
        {"skip_special_tokens": "no"},
        "skip_special_tokens",
    ),
    without_effect("spaces_between_special_tokens", False, "no"),
    sampled("allowed_token_ids", [5, 6], [], (5, 6)),
    Case(
        "prompt_logprobs",
        {"prompt_logprobs": 2},
        lambda seen: len((seen.body.get("prompt_logprobs") or seen.choice["prompt_logprobs"])[1]) == 2,
        {"prompt_logprobs": -1},
        "prompt_logprobs",
    ),
    Case(
        "add_special_tokens",
        {"add_special_tokens": False},
        lambda seen: seen.text == DEFAULT_REPLY,
        {"add_special_tokens": 1},
        "add_special_tokens",
    ),
    Case(
        "priority", {"priority": -3}, lambda seen: seen.sent[0].priority == -3, {"priority": 0.5}, "priority"
    ),
    Case("best_of", {"n": 2, "best_of": 2}, lambda seen: len(seen.sent) == 2, {"best_of": 4}, "best_of"),
    Case(
        "return_token_ids",
        {"return_token_ids": True},
        lambda seen: (
            seen.choice["token_ids"] == [*REPLY_IDS, EOS]
            and (seen.body.get("prompt_token_ids") or seen.choice["prompt_token_ids"])
            == seen.sent[0].prompt_token_ids
        ),
        {"return_token_ids": "yes"},
        "return_token_ids",
    ),
    Case(
        "bad_words",
        {"bad_words": ["Grüße", " well"]},
        lambda seen: (
            tuple(TOKENIZER.encode("Grüße", add_special_tokens=False)) in seen.sampling("bad_words")
            and tuple(TOKENIZER.encode("well", add_special_tokens=False)) in seen.sampling("bad_words")
        ),
        {"bad_words": [" "]},
        "bad_words",
    ),
    Case(
        "truncate_prompt_tokens",
        {"truncate_prompt_tokens": 2},
        lambda seen: len(seen.sent[0].prompt_token_ids) == 2 == seen.body["usage"]["prompt_tokens"],
        {"truncate_prompt_tokens": -2},
        "truncate_prompt_tokens",
    ),
    Case(
        "truncation_side",
        {"truncate_prompt_tokens": 1, "truncation_side": "right"},
        lambda seen: (
            seen.sent[0].prompt_token_ids[0] in (TOKENIZER.encode(PROMPT)[0], TOKENIZER.encode_chat(HELLO)[0])
        ),
        {"truncation_side": "middle"},
        "truncation_side",
    ),
    Case(
        "cache_salt",
        {"cache_salt": "s" * 128},
        lambda seen: seen.sent[0].cache_salt == "s" * 128,
        {"cache_salt": ""},
        "cache_salt",
    ),
    Case(
        "request_id",
        {"request_id": "mine-1"},
        lambda seen: seen.body["id"].endswith("cmpl-mine-1") and seen.headers["x-request-id"] == "mine-1",
        {"request_id": "two words"},
        "request_id",
    ),
    Case(
        "stream_interval",
        {"stream": True, "stream_interval": 10},
        lambda seen: 3 < len(seen.chunks) < 9,
        {"stream_interval": 0},
        "stream_interval",
    ),
    Case(
        "vllm_xargs",
        {"vllm_xargs": {}},
        lambda seen: bool(seen.text),
        {"vllm_xargs": {"a": 1}},
        "vllm_xargs.a",
    ),
    without_effect("user", "u", 5),
    without_effect("metadata", {"a": "b"}, "a"),
    without_effect("store", True, "yes"),
    without_effect("safety_identifier", "u", 5),
    without_effect("prompt_cache_key", "k", 5),
    without_effect("prompt_cache_options", {"ttl": "1h"}, 5),
    without_effect("prompt_cache_retention", "24h", 5),
    without_effect("verbosity", "low", 5),
]
CHAT_ONLY = [
    Case("messages", {"messages": [{"role": "developer", "content": PARTS}, *HELLO]},
         lambda seen: seen.text == DEFAULT_REPLY, {"messages": []}, "messages"),
    Case("logprobs", {"logprobs": True},
         lambda seen: len(seen.choice["logprobs"]["content"]) == len(REPLY_IDS) + 1,
         {"logprobs": 2}, "logprobs"),
    Case("top_logprobs", {"logprobs": True, "top_logprobs": 20},
         lambda seen: len(seen.choice["logprobs"]["content"][0]["top_logprobs"]) == 20,
         {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    Case("logprob_token_ids", {"logprobs": True, "logprob_token_ids": [9, 4]},
         lambda seen: seen.sampling("logprob_token_ids") == (9, 4),
         {"logprob_token_ids": [9]}, "logprob_token_ids"),
    Case("return_tokens_as_token_ids", {"logprobs": True, "return_tokens_as_token_ids": True},
         lambda seen: seen.choice["logprobs"]["content"][0]["token"] == f"token_id:{REPLY_IDS[0]}",
         {"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    Case("tools", {"tools": [TOOL]}, lambda seen: seen.text == DEFAULT_REPLY, {"tools": []}, "tools"),
    Case("tool_choice", {"tools": [TOOL], "tool_choice": "none"},
         lambda seen: seen.sent[0].prompt_token_ids == TOKENIZER.encode_chat(HELLO),
         {"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
    Case("parallel_tool_calls", {"tools": [TOOL], "parallel_tool_calls": False},
         lambda seen: seen.text == DEFAULT_REPLY, {"parallel_tool_calls": 2}, "parallel_tool_calls"),
    Case("include_reasoning", {"include_reasoning": False}, lambda seen: bool(seen.text),
         {"include_reasoning": 1}, "include_reasoning"),
    Case("chat_template", {"chat_template": "{{ messages[0].content }}!"},
         lambda seen: TOKENIZER.decode(seen.sent[0].prompt_token_ids) == HELLO[0]["content"] + "!",
         {"chat_template": "{{"}, "chat_template"),
    Case("reasoning_effort",
         {"reasoning_effort": "none", "chat_template": "{{ reasoning_effort }} {{ enable_thinking }}"},
         lambda seen: TOKENIZER.decode(seen.sent[0].prompt_token_ids) == "none False",
         {"reasoning_effort": "much"}, "reasoning_effort"),
    Case("documents", {"documents": [{"text": "It rains."}], "chat_template": "{{ documents[0].text }}"},
         lambda seen: TOKENIZER.decode(seen.sent[0].prompt_token_ids) == "It rains.",
         {"documents": [{"text": "It rains."}]}, "documents"),
    Case("modalities", {"modalities": ["text"]}, lambda seen: bool(seen.text),
         {"modalities": ["text", "audio"]}, "modalities"),
    Case("add_generation_prompt", {"add_generation_prompt": False},
         lambda seen: len(seen.sent[0].prompt_token_ids) < len(TOKENIZER.encode_chat(HELLO)),
         {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    Case("continue_final_message", {"messages": BEGUN, "continue_final_message": True},
         lambda seen: TOKENIZER.decode(seen.sent[0].prompt_token_ids).endswith("I say"),
         {"continue_final_message": "x"}, "continue_final_message"),
    Case("echo", {"messages": BEGUN, "continue_final_message": True, "echo": True},
         lambda seen: seen.text == "I say" + DEFAULT_REPLY, {"echo": 1}, "echo"),
    Case("chat_template_kwargs", {"chat_template_kwargs": {"a": 1}}, lambda seen: bool(seen.text),
         {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
]  # fmt: skip
COMPLETIONS_ONLY = [
    Case("prompt", {"prompt": [[5, 6], [7]]}, lambda seen: seen.body["choices"][1]["index"] == 1,
         {"prompt": ["a"] * 1025}, "prompt"),
    Case("logprobs", {"logprobs": 20},
         lambda seen: len(seen.choice["logprobs"]["top_logprobs"][0]) == 20, {"logprobs": -1}, "logprobs"),
    Case("logprob_token_ids", {"logprobs": 1, "logprob_token_ids": [9, 4]},
         lambda seen: seen.sampling("logprob_token_ids") == (9, 4),
         {"logprobs": 1, "logprob_token_ids": [*range(129)]}, "logprob_token_ids"),
    Case("return_tokens_as_token_ids", {"logprobs": 1, "return_tokens_as_token_ids": True},
         lambda seen: (
             seen.choice["logprobs"]["tokens"][0] == f"token_id:{REPLY_IDS[0]}"
             and seen.choice["logprobs"]["text_offset"][1] == len(TOKENIZER.token_text(REPLY_IDS[0]))
         ), {"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    Case("echo", {"echo": True, "logprobs": 1, "prompt_logprobs": 3},
         lambda seen: (
             seen.text == PROMPT + DEFAULT_REPLY
             and len(seen.choice["logprobs"]["top_logprobs"][1]) == 1
             and len(seen.choice["prompt_logprobs"][1]) == 3
         ), {"echo": 1}, "echo"),
]  # fmt: skip
CASES = [("chat", case) for case in BOTH + CHAT_ONLY] + [
    ("completions", case) for case in BOTH + COMPLETIONS_ONLY
]
IDS = [f"{route}-{case.name}" for route, case in CASES]


def test_every_field_has_a_case() -> None:
    assert {case.name for case in BOTH + CHAT_ONLY} == KNOWN_CHAT
    assert {case.name for case in BOTH + COMPLETIONS_ONLY} == KNOWN_COMPLETIONS
    assert not (KNOWN_CHAT | KNOWN_COMPLETIONS) & REFUSED.keys()
    assert all(field.values and field.effect for field in (*SHARED, *CHAT, *COMPLETIONS))


@pytest.mark.parametrize(("route", "case"), CASES, ids=IDS)
def test_a_field_does_what_it_says(http: httpx.Client, server: ServerThread, route: str, case: Case) -> None:
    path, body = ROUTES[route]
    answer = http.post(path, json={**body, **case.good})
    assert answer.status_code == 200, answer.text
    chunks, whole = [], {}
    if case.good.get("stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
    else:
        whole = answer.json()
    assert case.does(Seen(whole, chunks, server.engine.requests, answer.headers)), answer.text


@pytest.mark.parametrize(("route", "case"), CASES, ids=IDS)
def test_a_bad_value_is_refused_by_name(
    http: httpx.Client, server: ServerThread, route: str, case: Case
) -> None:
    path, body = ROUTES[route]
    answer = http.post(path, json={**body, **case.bad})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == case.param and error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] in error["message"] and server.engine.requests == []


@pytest.mark.parametrize("name", [*REFUSED, "guided_json", "guided_regex", "guided_choice", "guided_grammar"])
@pytest.mark.parametrize("route", ROUTES)
def test_what_would_be_ignored_is_refused_by_name(http: httpx.Client, route: str, name: str) -> None:
    """vllm#53975: unconstrained text is no answer to guided_json."""
    path, body = ROUTES[route]
    answer = http.post(path, json={**body, name: {"x": 1}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert http.post(path, json={**body, name: None}).status_code == 200


def test_the_header_names_a_request_before_its_body(http: httpx.Client) -> None:
    body = {"messages": HELLO, "request_id": "body"}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "header"})
    assert answer.json()["id"] == "chatcmpl-header" and answer.headers["x-request-id"] == "header"


def test_a_long_prompt_is_cut_to_what_fits_beside_the_answer(
    http: httpx.Client, server: ServerThread
) -> None:
    prompt = TOKENIZER.encode("word " * 500)
    sent = {"prompt": prompt, "truncate_prompt_tokens": -1, "max_tokens": 10, "return_token_ids": True}
    choice = http.post("/v1/completions", json=sent).json()["choices"][0]
    assert choice["prompt_token_ids"] == prompt[-246:] == server.engine.requests[0].prompt_token_ids


def test_the_default_limit_gives_way_to_a_long_prompt(http: httpx.Client, server: ServerThread) -> None:
    assert http.post("/v1/completions", json={"prompt": [5] * 250}).status_code == 200
    assert server.engine.requests[0].sampling.max_tokens == 6
    refused = http.post("/v1/completions", json={"prompt": [5] * 250, "max_tokens": 16})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_what_would_hold_up_every_step_is_bounded(http: httpx.Client) -> None:
    """Biases and bans are looked at for each token, while others wait."""
    for fields in (
        {"logit_bias": {str(token): 1 for token in range(1025)}},
        {"bad_words": ["a"] * 257},
        {"bad_words": ["a" * 129]},
    ):
        refused = http.post("/v1/completions", json={"prompt": "a", **fields})
        assert refused.status_code == 400 and refused.json()["error"]["param"] in fields


def test_too_many_answers(http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json={"prompt": [[5]] * 1000, "n": 5})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"


@pytest.mark.parametrize("interval", [1, 3, 1000])
@pytest.mark.parametrize("stop", [[], ["世"]])
def test_chunks_of_several_tokens_say_the_same(http: httpx.Client, interval: int, stop: list[str]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 64, "stream": True, "logprobs": 0, "stop": stop}
    lines = http.post("/v1/completions", json={**body, "stream_interval": interval}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if "{" in line]
    assert "".join(c["text"] for c in chunks) == (DEFAULT_REPLY.split("世")[0] if stop else DEFAULT_REPLY)
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    sizes = [len(c["logprobs"]["tokens"]) for c in chunks]
    assert sizes[0] == 1 and all(size == interval for size in sizes[1:-1])


def test_the_first_chunk_has_the_prompt_s_tokens(http: httpx.Client, server: ServerThread) -> None:
    for path, body in ROUTES.values():
        server.engine.requests.clear()
        answer = http.post(path, json={**body, "stream": True, "return_token_ids": True, "n": 2})
        chunks = [
            json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if "{" in line
        ]
        told = [
            c for c in chunks if "prompt_token_ids" in c or "prompt_token_ids" in (c["choices"] or [{}])[0]
        ]
        assert len(told) in (1, 2) and told[0] is chunks[0]
        for index in (0, 1):
            ids = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert [i for choice in ids for i in choice.get("token_ids", ())] == [*REPLY_IDS, EOS]


def test_what_the_server_was_started_with(tmp_path: Any) -> None:
    """--max-logprobs, --stream-interval and --seed."""
    engine = EngineConfig(model="", seed=5)
    server = ServerThread(tmp_path / "state", max_logprobs=-1, stream_interval=5, engine=engine)
    try:
        with server.http() as http:
            body = {"messages": HELLO, "logprobs": True, "top_logprobs": -1, "max_tokens": 1}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            assert server.engine.requests[0].sampling.logprobs == server.server.context.base.vocab_size
            lines = http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}).text
            assert lines.count("data:") < len(REPLY_IDS)
            drawn, given = random.Random(5), [add.sampling.seed for add in server.engine.requests]
            assert given == [drawn.getrandbits(63), drawn.getrandbits(63)]
    finally:
        server.stop()
