"""Whatever is asked for, a stream put together is the whole answer, and its chunks come in OpenAI's order."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.fake_engine import DEFAULT_REPLY
from tests.server.running import ServerThread

HELLO = [{"role": "user", "content": "Hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "I say"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
REPLIES = [
    DEFAULT_REPLY,
    "",
    "\n",
    "<",
    "<tool_call>",
    CALL,
    f"Let me see.\n{CALL}",
    CALL + "\n" + CALL,
    f"a {CALL} b",
    "\n\n" + CALL + "\n",
    "x" * 70,
]
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "stop": st.lists(st.sampled_from(["世", "e", "see.", "</tool_call>", "never", " well"]), max_size=2),
    "stream_interval": st.integers(1, 9),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "ignore_eos": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
}
CHAT = {
    "logprobs": st.booleans(),
    "tools": st.just([TOOL]),
    "parallel_tool_calls": st.booleans(),
    "echo": st.just(True),
}
COMPLETIONS = {
    "logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "prompt": st.sampled_from(["a", ["a", "b"]]),
}
OPTIONS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        name: st.booleans() for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")
    },
)
QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def streamed(
    http: httpx.Client, path: str, body: dict, options: dict | None
) -> tuple[list[dict], dict | None]:
    """Chunks with choices, and the usage; AssertionError where their order or heads are wrong."""
    answer = http.post(path, json={**body, "stream": True, "stream_options": options})
    assert answer.status_code == 200, answer.text
    *lines, end = answer.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    usage = None
    if options and options.get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == []
        usage = last["usage"]
        counted = [chunk["usage"] for chunk in chunks]
        if options.get("continuous_usage_stats"):
            assert [u["completion_tokens"] for u in counted] == sorted(
                u["completion_tokens"] for u in counted
            )
        else:
            assert counted == [None] * len(chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    return chunks, usage


def by_choice(chunks: list[dict]) -> dict[int, list[dict]]:
    """Each choice's parts; the last of them, and no other, ends it."""
    parts: dict[int, list[dict]] = {}
    for chunk in chunks:
        parts.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    for own in parts.values():
        assert [part["finish_reason"] is None for part in own] == [True] * (len(own) - 1) + [False]
    return parts


def joined(parts: list[dict], name: str) -> list[Any] | None:
    """A list that parts have pieces of."""
    pieces = [part[name] for part in parts if part.get(name) is not None]
    return [item for piece in pieces for item in piece] if pieces else None


def calls_of(deltas: list[dict]) -> list[dict]:
    calls: list[dict] = []
    for delta in deltas:
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls) and piece["type"] == "function"
                calls.append({"name": piece["function"]["name"], "arguments": ""})
            calls[piece["index"]]["arguments"] += piece["function"].get("arguments", "")
    return calls


@QUICK
@given(
    reply=st.sampled_from(REPLIES),
    fields=st.fixed_dictionaries({"max_tokens": st.integers(1, 90)}, optional={**COMMON, **CHAT}),
    options=OPTIONS,
)
def test_chat(
    server: ServerThread, http: httpx.Client, reply: str, fields: dict, options: dict | None
) -> None:
    server.engine.reply = reply
    if fields.get("echo"):
        fields |= {"messages": BEGUN, "continue_final_message": True}
    body = {"messages": HELLO, "seed": 1, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    chunks, usage = streamed(http, "/v1/chat/completions", body, options)
    assert usage is None or usage == whole["usage"]
    parts = by_choice(chunks)
    assert parts.keys() == {choice["index"] for choice in whole["choices"]}
    for choice in whole["choices"]:
        own, message = parts[choice["index"]], choice["message"]
        deltas = [part["delta"] for part in own]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
        assert calls_of(deltas) == [
            {name: call["function"][name] for name in ("name", "arguments")}
            for call in message.get("tool_calls", ())
        ]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
        logprobs = [part["logprobs"] for part in own if part["logprobs"]]
        content = [entry for block in logprobs for entry in block["content"]]
        assert content == ((choice["logprobs"] or {}).get("content") or [])
        assert (joined(own, "token_ids") or []) == choice.get("token_ids", [])
    if fields.get("return_token_ids"):
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


@QUICK
@given(
    reply=st.sampled_from(REPLIES),
    fields=st.fixed_dictionaries({"max_tokens": st.integers(1, 90)}, optional={**COMMON, **COMPLETIONS}),
    options=OPTIONS,
)
def test_completions(
    server: ServerThread, http: httpx.Client, reply: str, fields: dict, options: dict | None
) -> None:
    server.engine.reply = reply
    body = {"prompt": "Hello there", "seed": 1, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    chunks, usage = streamed(http, "/v1/completions", body, options)
    assert usage is None or usage == whole["usage"]
    parts = by_choice(chunks)
    assert parts.keys() == {choice["index"] for choice in whole["choices"]}
    for choice in whole["choices"]:
        own = parts[choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
        assert (joined(own, "token_ids") or []) == choice.get("token_ids", [])
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in own if part["logprobs"] for value in part["logprobs"][name]] == values
        if fields.get("return_token_ids"):
            assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]


@QUICK
@given(
    reply=st.sampled_from(REPLIES),
    fields=st.fixed_dictionaries(
        {"max_output_tokens": st.integers(1, 90)},
        optional={
            "stop": COMMON["stop"],
            "stream_interval": COMMON["stream_interval"],
            "tools": st.just([{"type": "function", **TOOL["function"]}]),  # type: ignore[dict-item]
            "include": st.just(["message.output_text.logprobs"]),
        },
    ),
)
def test_responses(server: ServerThread, http: httpx.Client, reply: str, fields: dict) -> None:
    server.engine.reply = reply
    body = {"input": "Hello", "seed": 1, **fields}
    whole = http.post("/v1/responses", json=body).json()
    text = http.post("/v1/responses", json={**body, "stream": True}).text
    events = [json.loads(block.split("\ndata: ")[1]) for block in text.removesuffix("\n\n").split("\n\n")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}" and last["usage"] == whole["usage"]
    assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == list(range(len(added))) and done == last["output"]
    for place, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == place and "delta" in event]
        said = "".join(event["delta"] for event in own)
        assert said == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
        assert {event["item_id"] for event in own} <= {item["id"]}


def plain(item: dict) -> dict:
    """An item without what is new each time."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}
