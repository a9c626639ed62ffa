"""/v1/responses: shapes by the official package's own types, the order of events, what is kept, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from coserve.server.application.request_fields import OWN_RESPONSES, REFUSED_RESPONSES
from coserve.server.application.response_store import ResponseStore, StoredResponse
from tests.server.fake_engine import DEFAULT_REPLY, TOKENIZER
from tests.server.running import BASE, ServerThread, wait_for

EVENT = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def respond(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/responses", json={"input": "Hello", **body})


def made(http: httpx.Client, **body: object) -> dict:
    answer = respond(http, **body)
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


def events(answer: httpx.Response) -> list[dict]:
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_of(server: ServerThread) -> str:
    return TOKENIZER.decode(server.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def test_a_response(http: httpx.Client, server: ServerThread) -> None:
    body = made(http, model=BASE, instructions="Be kind", metadata={"a": "b"}, temperature=0.5, user="u")
    (item,) = body["output"]
    assert (item["type"], item["status"], item["role"]) == ("message", "completed", "assistant")
    assert item["content"][0]["text"] == DEFAULT_REPLY
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert (body["metadata"], body["temperature"], body["user"]) == ({"a": "b"}, 0.5, "u")
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    assert server.engine.requests[0].prompt_token_ids == TOKENIZER.encode_chat(messages)
    usage = body["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]


def test_a_response_that_is_cut(http: httpx.Client) -> None:
    body = made(http, max_output_tokens=2)
    assert body["status"] == "incomplete" == body["output"][0]["status"]
    assert body["incomplete_details"] == {"reason": "max_output_tokens"} and body["completed_at"] is None


def test_the_order_of_events(http: httpx.Client) -> None:
    found = events(respond(http, stream=True, **LOGPROBS))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in found[4:-4]) == DEFAULT_REPLY == found[-4]["text"]
    first, last = found[0]["response"], found[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert first["id"] == last["id"] and found[2]["item"]["content"] == []
    assert found[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    entries = [entry for event in found[4:-4] for entry in event["logprobs"]]
    assert entries == found[-4]["logprobs"] and len(entries[0]["top_logprobs"]) == 2
    kept = http.get(f"/v1/responses/{last['id']}").json()
    assert kept == last


def test_a_stream_that_is_cut_ends_as_incomplete(http: httpx.Client) -> None:
    found = events(respond(http, stream=True, max_output_tokens=2))
    assert found[-1]["type"] == "response.incomplete" and found[-2]["item"]["status"] == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_output(http: httpx.Client, server: ServerThread, stream: bool) -> None:
    server.engine.reply = CALL
    if stream:
        found = events(respond(http, stream=True, tools=[TOOL], tool_choice="auto"))
        kinds = [event["type"].removeprefix("response.") for event in found]
        call = [kind for kind in kinds if "arguments" in kind]
        assert call[-1] == "function_call_arguments.done" and len(call) >= 2
        assert kinds.index("output_text.done") < kinds.index(call[0])
        pieces = [event["delta"] for event in found if event["type"].endswith("arguments.delta")]
        body = found[-1]["response"]
        assert "".join(pieces) == body["output"][1]["arguments"]
    else:
        body = made(http, tools=[TOOL], tool_choice="auto")
    said, call = body["output"]
    assert said["content"][0]["text"].strip() == "Let me see." and call["name"] == "weather"
    assert call["call_id"].startswith("call_") and call["status"] == "completed"
    server.engine.reply = DEFAULT_REPLY
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
    made(http, input=[output], previous_response_id=body["id"], tools=[TOOL])
    by_parts = prompt_of(server)
    assert "Rain." in by_parts and "Köln" in by_parts
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}, said, call, output]
    made(http, input=items, tools=[TOOL])
    assert prompt_of(server) == by_parts
    made(http, input=items, tools=[TOOL], tool_choice="none")
    assert "weather" not in prompt_of(server).split("Hello")[0]


def test_white_space_around_a_call_is_no_message(http: httpx.Client, server: ServerThread) -> None:
    server.engine.reply = "\n" + CALL.removeprefix("Let me see.")
    assert [item["type"] for item in made(http, tools=[TOOL])["output"]] == ["function_call"]
    server.engine.reply = "\n"
    assert made(http)["output"][0]["content"][0]["text"] == "\n"


THINKS = "{# <think> </think> #}{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_thought_is_an_item(tmp_path: Path, stream: bool) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(THINKS)
    server = ServerThread(tmp_path / "state", chat_template=str(template))
    server.engine.reply = "<think>\nHm, 1 + 1.\n</think>\n\nTwo."
    try:
        with server.http() as http:
            if stream:
                found = events(respond(http, stream=True, **LOGPROBS))
                kinds = dict.fromkeys(event["type"].removeprefix("response.") for event in found)
                assert list(kinds)[2:8] == [
                    "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
                    "content_part.done", "output_item.done",
                ]  # fmt: skip
                body = found[-1]["response"]
            else:
                body = made(http)
            thought, said = body["output"]
            assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, 1 + 1."}]
            assert said["content"][0]["text"] == "Two." and thought["summary"] == []
            assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
            made(http, input="And?", previous_response_id=body["id"])
            assert "Hm" not in prompt_of(server) and "Two." in prompt_of(server)
            cut = made(http, max_output_tokens=4)
            assert [item["status"] for item in cut["output"]] == ["incomplete"]
    finally:
        server.stop()


def test_a_long_chat_is_cut_where_that_is_wanted(http: httpx.Client, server: ServerThread) -> None:
    said = [
        {"role": role, "content": f"{role} {number} " + "word " * 8}
        for number in range(20)
        for role in ("user", "assistant")
    ]
    body = {"input": [*said, {"role": "user", "content": "Last"}], "instructions": "Be kind"}
    assert respond(http, **body).json()["error"]["code"] == "context_length_exceeded"
    kept = made(http, **body, truncation="auto", max_output_tokens=20)
    assert kept["truncation"] == "auto"
    prompt = prompt_of(server)
    assert "Be kind" in prompt and "Last" in prompt and "user 0 " not in prompt
    first = min(number for number in range(20) if f"user {number} " in prompt)
    assert (
        all(f"user {number} " in prompt for number in range(first, 20))
        and f"assistant {first - 1} " not in prompt
    )
    more = [
        {"role": "system", "content": "Be kind"},
        *said[2 * first - 2 :],
        {"role": "user", "content": "Last"},
    ]
    assert len(TOKENIZER.encode_chat(more)) + 20 > 256, "one turn more would not have fitted"


def test_the_tokens_of_an_input_are_counted(http: httpx.Client, server: ServerThread) -> None:
    counted = http.post("/v1/responses/input_tokens", json={"input": "Hello"}).json()
    messages = [{"role": "user", "content": "Hello"}]
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": len(TOKENIZER.encode_chat(messages)),
    }
    assert server.engine.requests == []
    assert server.openai().responses.input_tokens.count(input="Hello").input_tokens == counted["input_tokens"]


def test_padding_hides_how_long_a_token_is(http: httpx.Client) -> None:
    def sizes(path: str, body: dict) -> set[int]:
        options = {"stream": True, "stream_options": {"include_obfuscation": True}}
        blocks = http.post(path, json={**body, **options}).text.split("\n\n")
        return {
            len(block.encode()) % 32 for block in blocks if '"obfuscation"' in block and "DONE" not in block
        }

    assert len(sizes("/v1/responses", {"input": "Hi"})) == 1
    assert len(sizes("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})) == 1


def test_a_demanded_form_reaches_the_engine(http: httpx.Client, server: ServerThread) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    body = made(http, text={"format": form})
    assert body["text"]["format"] == form and "integer" in server.engine.requests[0].sampling.grammar
    made(http, tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
    assert "weather" in server.engine.requests[-1].sampling.grammar
    mode = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    made(http, tools=[TOOL], tool_choice=mode)
    assert "weather" in server.engine.requests[-1].sampling.grammar


def test_a_conversation_goes_on(http: httpx.Client, server: ServerThread) -> None:
    first = made(http, instructions="Be kind")
    second = made(http, input="And?", previous_response_id=first["id"], store=False)
    assert second["previous_response_id"] == first["id"]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": DEFAULT_REPLY},
        {"role": "user", "content": "And?"},
    ]
    assert server.engine.requests[-1].prompt_token_ids == TOKENIZER.encode_chat(messages), "no instructions"
    assert http.get(f"/v1/responses/{second['id']}").status_code == 404, "not kept"
    gone = respond(http, previous_response_id=second["id"])
    assert gone.status_code == 400 and gone.json()["error"]["code"] == "previous_response_not_found"


def test_what_is_kept(http: httpx.Client) -> None:
    body = made(http, input=[{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}])
    url = f"/v1/responses/{body['id']}"
    assert http.get(url).json() == body
    assert http.get(f"{url}/input_items", params={"order": "up"}).json()["error"]["param"] == "order"
    listed = http.get(f"{url}/input_items", params={"order": "asc"}).json()
    assert [item["content"][0]["text"] for item in listed["data"]] == ["One", "Two"]
    newest = http.get(f"{url}/input_items", params={"limit": 1}).json()
    assert newest["has_more"] and newest["data"][0]["content"][0]["text"] == "Two"
    cancelled = http.post(f"{url}/cancel")
    assert cancelled.status_code == 400 and "background" in cancelled.json()["error"]["message"]
    assert http.get(url, params={"stream": "true"}).json()["error"]["param"] == "stream"
    assert http.delete(url).json() == {"id": body["id"], "object": "response", "deleted": True}
    assert http.get(url).status_code == http.delete(url).status_code == 404


def test_the_store_is_bounded_and_each_key_has_its_own() -> None:
    store = ResponseStore(max_responses=3, max_bytes=10_000)
    for number in range(5):
        store.keep(StoredResponse({"id": f"r{number}"}, (), (), "a"))
    assert len(store) == 3 and store.get("r4", "a").id == "r4"
    for missing in (("r0", "a"), ("r4", "b"), ("r4", "")):
        with pytest.raises(Exception, match="no response"):
            store.get(*missing)
    store.keep(StoredResponse({"id": "large", "text": "x" * 9_990}, (), (), "a"))
    assert len(store) == 0, "what is larger than all room is not kept"
    store.keep(StoredResponse({"id": "again"}, (), (), "a"))
    assert len(store) == 1


def test_nobody_pushes_out_those_of_others() -> None:
    by_count, by_bytes = ResponseStore(max_responses=4), ResponseStore(max_bytes=4_000)
    for store, text in ((by_count, ""), (by_bytes, "x" * 900)):
        store.keep(StoredResponse({"id": "mine", "text": text}, (), (), "quiet"))
        for number in range(50):
            store.keep(StoredResponse({"id": f"r{number}", "text": text}, (), (), "busy"))
        assert store.get("mine", "quiet").id == "mine" and store.get("r49", "busy").id == "r49"
        assert len(store) <= 4
        store.delete("mine", "quiet")
        assert len(store) <= 3
        with pytest.raises(Exception, match="no response"):
            store.delete("mine", "quiet")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    server = ServerThread(tmp_path_factory.mktemp("keyed") / "s", api_keys=("one", "two"))
    yield server
    server.stop()


def test_nobody_reads_another_key_s_responses(keyed: ServerThread) -> None:
    with keyed.http("one") as one, keyed.http("two") as two:
        body = made(one)
        assert one.get(f"/v1/responses/{body['id']}").status_code == 200
        assert two.get(f"/v1/responses/{body['id']}").status_code == 404
        assert respond(two, previous_response_id=body["id"]).status_code == 400


def test_a_failure_in_a_stream_is_its_last_event(http: httpx.Client, server: ServerThread) -> None:
    """vllm#52852: whoever reads a stream learns that it failed."""
    server.engine.fail_after = 3
    found = events(respond(http, stream=True))
    assert found[-1]["type"] == "response.failed" and found[-1]["response"]["error"]["code"] == "server_error"
    server.engine.fail_after = 0
    assert respond(http, stream=True).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_aborts(server: ServerThread, stream: bool) -> None:
    server.engine.hold.clear()
    try:
        with server.http() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/responses", json={"input": "Hi", "stream": stream}, timeout=0.2)
        wait_for(lambda: len(server.engine.aborted) == 1)
    finally:
        server.engine.hold.set()


def test_accepted(http: httpx.Client, server: ServerThread) -> None:
    """What agents send with every request, and vLLM's extras."""
    fields = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "truncation": "disabled",
        "text": {"verbosity": "low", "format": {"type": "text"}},
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "top_k": 3,
        "cache_salt": "s",
        "background": False,
        "max_tool_calls": 3,
    }
    body = made(http, **fields)
    assert (body["service_tier"], body["text"]) == ("flex", fields["text"])
    assert server.engine.requests[0].sampling.top_k == 3 and server.engine.requests[0].cache_salt == "s"


TEXT = {"type": "json_schema", "name": "x"}
REFUSED = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "alien", "content": "x"}]}, "input[0].role"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": "word " * 500}, "input_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice.mode"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "no"}]},
        },
        "tool_choice.tools[0].name",
    ),
    ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    ({"tools": [{**TOOL, "parameters": {"type": 5}, "strict": True}]}, "tools[0].parameters"),
    ({"text": {"format": TEXT}}, "text.format.schema"),
    ({"text": {"format": {**TEXT, "schema": {"type": 5}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {}}}, "text.format.type"),
    ({"include": ["code_interpreter_call.outputs"]}, "include[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({**LOGPROBS, "top_logprobs": 21}, "top_logprobs"),
    ({"truncation": "old"}, "truncation"),
    ({"truncation": "auto", "input": "word " * 500}, "input_tokens"),
    ({"stream_options": {}}, "stream_options"),
    ({"previous_response_id": 5}, "previous_response_id"),
    ({"previous_response_id": "resp_x"}, "previous_response_id"),
    ({"stop_regex": "x"}, "stop_regex"),
    ({"guided_json": {}}, "guided_json"),
    ({"instructions": 5}, "instructions"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    ({"store": "yes"}, "store"),
    *(({name: True}, name) for name in REFUSED_RESPONSES),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(fields)[:40] for fields, _ in REFUSED])
def test_refused_by_name(http: httpx.Client, server: ServerThread, fields: dict, param: str) -> None:
    answer = respond(http, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and set(error) == {"message", "type", "param", "code"}
    assert server.engine.requests == []


def test_every_own_field_is_in_a_test() -> None:
    source = Path(__file__).read_text()
    assert [name for name in OWN_RESPONSES if f'"{name}"' not in source and f"{name}=" not in source] == []
