"""Tools by OpenAI's own client on the demo model: choices, parsing helpers, streamed and whole alike."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from tests.faults.served import Served

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
NAMED_ADD = {"type": "function", "function": {"name": "add"}}
PARIS = "What is the weather in Paris?"


class get_weather(pydantic.BaseModel):  # its name is the tool's
    city: str


def ask(
    client: openai.OpenAI, served: Served, text: str, **fields: Any
) -> tuple[str, list[tuple[str, Any]], str]:
    """(content, calls, finish reason), once the streamed answer is seen to be the same."""
    body = {
        "model": served.model, "messages": [{"role": "user", "content": text}], "temperature": 0,
        "tools": [WEATHER, ADD], "max_tokens": 120, **fields,
    }  # fmt: skip
    choice = client.chat.completions.create(**body).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    whole = (choice.message.content or "", calls, choice.finish_reason)
    content, streamed, reasons = "", [], []
    for chunk in client.chat.completions.create(**body, stream=True):
        for part in chunk.choices:
            content += part.delta.content or ""
            for call in part.delta.tool_calls or []:
                if call.id:
                    streamed.append([call.function.name, ""])
                streamed[call.index][1] += call.function.arguments or ""
            reasons += [part.finish_reason] * (part.finish_reason is not None)
    assert (content, [tuple(call) for call in streamed], *reasons) == whole
    return whole[0], [(name, json.loads(arguments)) for name, arguments in calls], whole[2]


def test_the_model_chooses(client: openai.OpenAI, served: Served) -> None:
    assert ask(client, served, PARIS) == ("", [("get_weather", {"city": "Paris"})], "tool_calls")
    content, calls, reason = ask(client, served, "Hello")
    assert content and not calls and reason == "stop"


ONLY_ADD = {"mode": "auto", "tools": [NAMED_ADD]}
CHOICES = [
    ("Hello", "required", ("get_weather", "add"), "tool_calls"),
    (PARIS, NAMED_ADD, ("add",), "stop"),
    (PARIS, {"type": "allowed_tools", "allowed_tools": ONLY_ADD}, ("add",), "tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "choice", "names", "reason"), CHOICES, ids=["required", "named", "allowed"])
def test_calls_that_are_demanded_keep_to_their_schema(
    client: openai.OpenAI, served: Served, text: str, choice: Any, names: tuple[str, ...], reason: str
) -> None:
    content, calls, ended = ask(client, served, text, tool_choice=choice, parallel_tool_calls=False)
    assert content == "" and ended == reason
    ((name, arguments),) = calls
    kinds = {"get_weather": {"city": str}, "add": {"a": int, "b": int}}[name]
    assert name in names and {key: type(value) for key, value in arguments.items()} == kinds


def test_a_demanded_sum(client: openai.OpenAI, served: Served) -> None:
    assert ask(client, served, "What is 7 + 5?", tool_choice=NAMED_ADD)[1] == [("add", {"a": 7, "b": 5})]


def test_a_cut_call(client: openai.OpenAI, served: Served) -> None:
    choice = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": PARIS}], tools=[WEATHER], max_tokens=16,
        tool_choice="required", temperature=0,
    ).choices[0]  # fmt: skip
    assert choice.finish_reason == "length"


def test_pydantic_tools_are_parsed(client: openai.OpenAI, served: Served) -> None:
    body: dict[str, Any] = {
        "model": served.model,
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
        "temperature": 0,
        "tools": [openai.pydantic_function_tool(get_weather)],
    }
    (call,) = client.chat.completions.parse(**body).choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Rome")
    with client.chat.completions.stream(**body) as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Rome")
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert kinds.count("tool_calls.function.arguments.done") == 1


def test_a_tool_s_result_is_told(client: openai.OpenAI, served: Served) -> None:
    """The whole turn: a call, its result, and what the model makes of it."""
    messages: list[Any] = [{"role": "user", "content": PARIS}]
    answer = client.chat.completions.create(
        model=served.model, messages=messages, tools=[WEATHER], temperature=0
    ).choices[0]
    assert answer.message.tool_calls
    messages += [
        answer.message,
        {"role": "tool", "tool_call_id": answer.message.tool_calls[0].id, "content": "sunny, 21 degrees"},
    ]
    told = client.chat.completions.create(
        model=served.model, messages=messages, tools=[WEATHER], temperature=0
    ).choices[0]
    assert told.finish_reason == "stop" and told.message.content
