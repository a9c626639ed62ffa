"""Tools, reasoning and roles in chat answers: requests checked, pieces in order, stream and whole alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coserve.cli import main as command
from coserve.errors import ConfigError
from tests.server.fake_engine import TOKENIZER
from tests.server.running import ServerThread

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
ARGUMENTS = '{"city":  "Köln"}'
CALL = '<tool_call>\n{"name": "weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
TIME = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
THINKS = """{# <tool_call> <think> </think> #}{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}
{% endfor %}{{ tools }}"""


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def tool(**fields: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]},
    }


def answer(http: httpx.Client, **fields: object) -> dict[str, Any]:
    """A whole choice, once it is seen that the streamed one put together is the same."""
    body = {"messages": HELLO, "seed": 1, **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    streamed = together(http.post("/v1/chat/completions", json={**body, "stream": True}))
    whole = {
        name: choice["message"].get(name) or "" for name in ("content", "reasoning", "reasoning_content")
    }
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert streamed == {
        **whole,
        "role": choice["message"]["role"],
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "logprobs": (choice["logprobs"] or {}).get("content") or [],
        "token_ids": choice.get("token_ids", []),
    }
    return choice


def together(response: httpx.Response) -> dict[str, Any]:
    """What a stream says, put together as clients do."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    made: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": []}
    made |= {"logprobs": [], "token_ids": []}
    for (choice,) in (json.loads(line)["choices"] for line in lines):
        delta = choice["delta"]
        assert "finish_reason" not in made
        for name in ("content", "reasoning", "reasoning_content"):
            made[name] += delta.get(name, "")
        if "role" in delta:
            made["role"] = delta["role"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(made["calls"]) and call["type"] == "function"
                assert call["function"]["arguments"] == ""
                made["calls"].append(dict(call["function"]))
            else:
                assert call["index"] == len(made["calls"]) - 1 and set(call["function"]) == {"arguments"}
                made["calls"][-1]["arguments"] += call["function"]["arguments"]
        made["logprobs"] += (choice["logprobs"] or {}).get("content", [])
        made["token_ids"] += choice.get("token_ids", [])
        if choice["finish_reason"] is not None:
            made["finish_reason"] = choice["finish_reason"]
    return made


def prompt(server: ServerThread) -> str:
    return TOKENIZER.decode(server.engine.requests[0].prompt_token_ids, skip_special_tokens=False)


def grammar(server: ServerThread) -> str:
    return server.engine.requests[0].sampling.grammar


def test_several_calls_and_text_around_them(http: httpx.Client, server: ServerThread) -> None:
    server.engine.reply = f"Let me see.\n{CALL}\n{TIME}\nDone."
    choice = answer(http, tools=TOOLS, return_token_ids=True, logprobs=True)
    message = choice["message"]
    assert message["content"] == "Let me see.\nDone." and choice["finish_reason"] == "tool_calls"
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert calls == [("weather", ARGUMENTS), ("clock", "{}")]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"])
    assert answer(http, tools=TOOLS, stream_interval=7)["message"]["content"] == message["content"]
    only = answer(http, tools=TOOLS, parallel_tool_calls=False)["message"]
    assert len(only["tool_calls"]) == 1 and grammar(server) == ""


def test_arguments_are_streamed_as_they_come(http: httpx.Client, server: ServerThread) -> None:
    server.engine.reply = CALL
    response = http.post("/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS, "stream": True})
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in response.text.split("\n\n")[:-2]]
    assert sum("tool_calls" in delta for delta in deltas) > 5


def test_what_is_no_call_is_content(http: httpx.Client, server: ServerThread) -> None:
    for text in ("<tool_call>nonsense</tool_call> I said.", '<tool_call>{"name": 3', "a <tool_"):
        server.engine.reply = text
        choice = answer(http, tools=TOOLS)
        assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]


def test_a_cut_call_ends_with_length(http: httpx.Client, server: ServerThread) -> None:
    """vllm#53269: stream and unary."""
    server.engine.reply = CALL
    whole = len(TOKENIZER.encode(CALL))
    for tokens in range(1, whole):
        choice = answer(http, tools=TOOLS, max_tokens=tokens)
        assert choice["finish_reason"] == "length"
    choice = answer(http, tools=TOOLS, stop=["Kö"])
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":  "'


def test_logprobs_come_with_the_text_of_their_tokens(http: httpx.Client, server: ServerThread) -> None:
    """Text is held back where it may open a call or a stop string; its tokens are held with it."""
    server.engine.reply = "Grüße 世界: a <tool_ b, zz and zzy.\n\n <tool_call"
    body = {"messages": HELLO, "tools": TOOLS, "stop": ["zzz"], "logprobs": True, "return_token_ids": True}
    response = http.post("/v1/chat/completions", json={**body, "stream": True})
    said, tokens = b"", b""
    for line in response.text.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        said += choice["delta"].get("content", "").encode()
        entries = (choice["logprobs"] or {}).get("content", [])
        assert len(entries) == len(choice.get("token_ids", []))
        tokens += b"".join(bytes(entry["bytes"]) for entry in entries)
        if choice["finish_reason"] is None and said != server.engine.reply.encode():
            assert tokens.startswith(said) or said.startswith(tokens)
            assert -8 < len(tokens) - len(said) < 4  # within a token of which part is held, or a character
    assert said.decode() == server.engine.reply and tokens.startswith(said)


CHOICES: list[tuple[object, str, Callable[[str], bool]]] = [
    ("auto", "tool_calls", lambda made: made == ""),
    ("required", "tool_calls", lambda made: '\\"weather\\"' in made and '\\"clock\\"' in made),
    (named("weather"), "stop", lambda made: '\\"weather\\"' in made and '\\"clock\\"' not in made),
    (allowed("required", "weather"), "tool_calls", lambda made: '\\"clock\\"' not in made),
    (allowed("auto", "weather"), "tool_calls", lambda made: "TEXT" in made and '\\"clock\\"' not in made),
    (allowed("auto", "clock", "weather"), "tool_calls", lambda made: made == ""),
]


@pytest.mark.parametrize(("choice", "reason", "constrains"), CHOICES, ids=range(len(CHOICES)))
def test_choices(
    http: httpx.Client, server: ServerThread, choice: object, reason: str, constrains: Callable[[str], bool]
) -> None:
    server.engine.reply = CALL
    made = answer(http, tools=TOOLS, tool_choice=choice)
    assert made["finish_reason"] == reason and made["message"]["tool_calls"]
    assert constrains(grammar(server)), grammar(server)
    assert '"name": "clock"' in prompt(server)  # all tools are shown, whichever may be called


def test_strict_functions_are_held_to_their_schema(http: httpx.Client, server: ServerThread) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    server.engine.reply = "Hello."
    answer(http, tools=[strict, CLOCK])
    assert "TEXT" in grammar(server) and '"city"' in grammar(server)


REFUSED = [
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [tool(parameters=3)]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool(strict="x")]}, "tools[0].function.strict"),
    ({"tools": [tool(strict=True, parameters={"not": {}})]}, "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": named("weather")}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": named("no")}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
    ({"tools": TOOLS, "tool_choice": allowed("must", "clock")}, "tool_choice.allowed_tools.mode"),
    (
        {"tools": TOOLS, "tool_choice": allowed("auto", "clock", "no")},
        "tool_choice.allowed_tools.tools[1].function.name",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [named("f")]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"chat_template_kwargs": {"template": "x"}}, "chat_template_kwargs.template"),
    ({"chat_template_kwargs": {"self": "x"}}, "chat_template_kwargs.self"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "content": "x", "reasoning": 3}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_refused_by_name(
    http: httpx.Client, server: ServerThread, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"] and server.engine.requests == []


def test_a_conversation_with_tools_is_rendered(http: httpx.Client, server: ServerThread) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "name": "ada", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "Well?"},
    ]
    answer(http, messages=messages, tools=TOOLS)
    text = prompt(server)
    for part in ("Be brief.", '{"name": "weather", "arguments": {"city": "Köln"}}', "sunny", "No.", "Well?"):
        assert part in text


# ------------------------------------------------------------------ reasoning


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    template = tmp_path_factory.mktemp("template") / "t.jinja"
    template.write_text(THINKS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")
    server = ServerThread(
        tmp_path_factory.mktemp("state") / "s", chat_template=str(template), response_role="helper"
    )
    yield server
    server.stop()


@pytest.fixture
def thoughts(thinking: ServerThread) -> Iterator[httpx.Client]:
    thinking.engine.requests.clear()
    with thinking.http() as client:
        yield client


def test_reasoning_is_apart(thoughts: httpx.Client, thinking: ServerThread) -> None:
    thinking.engine.reply = "<think>\nHm, 1 + 1.\n</think>\n\nTwo."
    choice = answer(thoughts, logprobs=True)
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Hm, 1 + 1."
    assert message["content"] == "Two." and message["role"] == "helper" and choice["finish_reason"] == "stop"
    body = thoughts.post("/v1/chat/completions", json={"messages": HELLO}).json()
    reasoning = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == len(TOKENIZER.encode("<think>\nHm, 1 + 1.\n</think>"))
    hidden = answer(thoughts, include_reasoning=False)["message"]
    assert hidden["content"] == "Two." and "reasoning" not in hidden and "reasoning_content" not in hidden


def test_reasoning_cut_and_calls_after_it(thoughts: httpx.Client, thinking: ServerThread) -> None:
    thinking.engine.reply = f"<think>Hm.</think>\n{CALL}"
    message = answer(thoughts, tools=TOOLS)["message"]
    assert message["reasoning"] == "Hm." and len(message["tool_calls"]) == 1 and message["content"] is None
    choice = answer(thoughts, max_tokens=6)
    assert choice["message"]["reasoning"] == "Hm" and choice["message"]["content"] == ""
    assert choice["finish_reason"] == "length"


def test_reasoning_can_be_switched_off(thoughts: httpx.Client, thinking: ServerThread) -> None:
    thinking.engine.reply = "<think>is a tag."
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        message = answer(thoughts, **fields)["message"]
        assert message["content"] == "<think>is a tag." and "reasoning" not in message


def test_the_command_line_shows_reasoning_beside_the_answer(
    thinking: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking.engine.reply = "<think>\nHm.\n</think>\n\nTwo."
    assert command.run(["chat", "1 + 1?", "--max-tokens", "90", "--url", thinking.url]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Two.\n", "Hm.\n\n")


def test_earlier_reasoning_reaches_the_template(thoughts: httpx.Client, thinking: ServerThread) -> None:
    thinking.engine.reply = "Yes."
    for name in ("reasoning", "reasoning_content"):
        thinking.engine.requests.clear()
        answer(
            thoughts, messages=[*HELLO, {"role": "assistant", name: "I thought.", "content": "Hi"}, *HELLO]
        )
        assert "I thought.Hi" in prompt(thinking)


def test_demanded_calls_follow_free_reasoning(thoughts: httpx.Client, thinking: ServerThread) -> None:
    thinking.engine.reply = CALL
    answer(thoughts, tools=TOOLS, tool_choice="required")
    first = json.loads(grammar(thinking))["grammars"][0]["lark_grammar"]
    assert "thought" in first and "@answer" in first


# ------------------------------------------------------------------ flags and templates


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    template = tmp_path_factory.mktemp("template") / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    server = ServerThread(
        tmp_path_factory.mktemp("state") / "s", chat_template=str(template), enable_auto_tool_choice=False
    )
    yield server
    server.stop()


def test_templates_without_tools_are_told_in_a_message(strict_server: ServerThread) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    strict_server.engine.reply = TIME
    strict_server.engine.requests.clear()
    with strict_server.http() as http:
        made = answer(http, messages=messages, tools=TOOLS, tool_choice="required")
    assert [c["function"]["name"] for c in made["message"]["tool_calls"]] == ["clock"]
    text = prompt(strict_server)
    assert text.startswith("user: # Tools") and '"name": "weather"' in text and text.count("Hello") == 1
    assert text.endswith(f"assistant: {TIME}\nuser: <tool_response>\nnoon\n</tool_response>\n")


def test_templates_that_read_tools_from_the_system_message(http: httpx.Client, server: ServerThread) -> None:
    """Phi-4-mini's does."""
    template = (
        "{% for message in messages %}<{{ message.role }}>"
        "{% if message['tools'] %}[{{ message['tools'] }}]{% endif %}{{ message.content }}\n{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"}]
    answer(http, messages=messages, tools=[CLOCK], chat_template=template)
    assert prompt(server) == (
        '<system>[[{"name": "clock"}]]You are a helpful assistant with some tools.\n<user>Hello\n'
        '<assistant><|tool_call|>[{"name": "clock", "arguments": {}}]<|/tool_call|>\n<tool_response>noon\n'
    )


def test_tools_that_a_template_would_drop_are_refused(http: httpx.Client) -> None:
    body = {"messages": HELLO, "tools": TOOLS, "chat_template": "{{ messages[0].tool_calls }}"}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "tools"


def test_what_only_some_servers_take(strict_server: ServerThread) -> None:
    with strict_server.http() as http:
        for fields, param in (
            ({"tools": TOOLS}, "tool_choice"),
            ({"chat_template": "{{ 1 }}"}, "chat_template"),
            ({"documents": []}, "documents"),
        ):
            response = http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
            assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_server_without_parsers(tmp_path: Path) -> None:
    server = ServerThread(tmp_path / "s", tool_call_parser="none", reasoning_parser="none")
    try:
        server.engine.reply = CALL
        with server.http() as http:
            assert answer(http, tools=TOOLS)["message"]["content"] == CALL
            body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
            response = http.post("/v1/chat/completions", json=body)
            assert response.json()["error"]["param"] == "tool_choice"
    finally:
        server.stop()
    with pytest.raises(ConfigError, match="--tool-call-parser 'nix'"):
        ServerThread(tmp_path / "t", tool_call_parser="nix")
