"""`response_format` and `structured_outputs` over HTTP, their fields over gRPC: which grammar the engine gets
for them, what is refused, and by which name."""

from __future__ import annotations

import json
import threading
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.errors import InvalidRequest
from coserve.grammar import MAX_GRAMMAR_BYTES, GrammarVocabulary
from coserve.server.application import structured_output
from coserve.server.fields import Fields
from coserve.server.grpc_gen import inference_pb2, inference_pb2_grpc
from tests.server.fake_engine import MODEL, TOKENIZER
from tests.server.running import BASE, ServerThread

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ANNA = '{"name": "Anna", "age": 12}'
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<call=add>", "schema": {"const": 5}, "end": "</call>"}],
    "triggers": ["<call="],
}
VOCABULARY = GrammarVocabulary(TOKENIZER, MODEL.vocab_size, TOKENIZER.eos_token_ids)


def matches(grammar: str, text: str) -> bool:
    """Whether a whole text is one of the grammar's."""
    matcher = VOCABULARY.compile(grammar).deep_copy()
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if not allowed[token]:
            return False
        matcher.consume_token(token)
    return matcher.is_accepting()


def ask(http: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    body = (
        {"prompt": "Hello"} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    return http.post(f"/v1/{route}", json={**body, **fields})


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    described = {"name": "person", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def structured(**kinds: Any) -> dict[str, Any]:
    return {"structured_outputs": kinds}


JSON_TEXTS = (
    ["{}", '{"a": [1, {"b": null}]}', json.dumps({"a": [1]}, indent=2)],
    ["[1]", "7", '{\n\n"a":1}'],
)
GOOD: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, *JSON_TEXTS),
    (structured(json_object=True), *JSON_TEXTS),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, *JSON_TEXTS),
    (schema_format(PERSON, strict=True, description="who"), [ANNA], [ANNA[:-1], '{"name": "Anna"}', "{}"]),
    (structured(json=PERSON), [ANNA, ANNA.replace(" ", "")], ['{"name": "A", "age": 1.5}']),
    (structured(json=json.dumps(PERSON)), [ANNA], ["null"]),
    (structured(json=PERSON, disable_any_whitespace=True), [ANNA.replace(" ", "")], [ANNA]),
    (
        structured(json=PERSON, whitespace_pattern=" {0,2}"),
        [ANNA.replace(" ", "  ")],
        [ANNA.replace(" ", "\n")],
    ),
    (structured(regex=r"[a-f]{2}/\d+"), ["ab/12"], ["ab/", "xab/12", "ab/12 "]),
    (structured(choice=["yes", 'no "and"\n', "é/😀"]), ["yes", 'no "and"\n', "é/😀"], ["ye", "no", "yesyes"]),
    (structured(grammar='start: "a" b+\nb: "b" | "c"'), ["ab", "accb"], ["a", "ba"]),
    (structured(grammar='root ::= "x" ws "y"\nws ::= [ \\t]*'), ["xy", "x  y"], ["x", "x z"]),
    (
        structured(structural_tag=json.dumps(TAG)),
        ["so <call=add>5</call> done", "nothing"],
        ["<call=add>6</call>", "<call=sub>5</call>", "<call=add>5"],
    ),
    ({"response_format": TAG}, ["<call=add>5</call>"], ["<call=other>"]),
]


@pytest.mark.parametrize(("fields", "good", "bad"), GOOD, ids=[json.dumps(f)[:60] for f, _, _ in GOOD])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_the_engine_gets_a_grammar_of_what_was_asked_for(
    http: httpx.Client, server: ServerThread, route: str, fields: dict, good: list[str], bad: list[str]
) -> None:
    assert ask(http, route, **fields, n=2).status_code == 200
    (grammar,) = {request.sampling.grammar for request in server.engine.requests}
    assert {text: matches(grammar, text) for text in good} == dict.fromkeys(good, True)
    assert {text: matches(grammar, text) for text in bad} == dict.fromkeys(bad, False)


FREE = [
    {},
    {"response_format": {"type": "text"}},
    {"response_format": None},
    structured(),
    structured(json=None),
]


@pytest.mark.parametrize("fields", FREE, ids=str)
def test_free_answers_have_no_grammar(http: httpx.Client, server: ServerThread, fields: dict) -> None:
    assert ask(http, "chat/completions", **fields).status_code == 200
    assert server.engine.requests[0].sampling.grammar == ""


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(links: int) -> dict[str, Any]:
    """References one behind the other, each of which the library follows by calling itself."""
    links_of = {
        f"d{n}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(links)
    }
    return {"$defs": links_of | {f"d{links}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def test_a_long_chain_of_references_does_not_end_the_process(
    http: httpx.Client, server: ServerThread
) -> None:
    """On an ordinary stack some thousand of them do."""
    assert ask(http, "completions", **schema_format(chain(1850))).status_code == 200
    response = ask(http, "completions", **schema_format(chain(2000)))
    assert response.status_code == 400 and response.json()["error"]["param"] == SCHEMA
    (request,) = server.engine.requests
    assert len(request.sampling.grammar) > 0.9 * MAX_GRAMMAR_BYTES


SCHEMA = "response_format.json_schema.schema"
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {}}, "response_format.type", "required"),
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "required",
    ),
    (schema_format("object"), SCHEMA, "object"),
    (schema_format(PERSON, strict="yes"), "response_format.json_schema.strict", "true or false"),
    (schema_format({"type": "person"}), SCHEMA, "person"),
    (schema_format({"not": {"type": "string"}}), SCHEMA, "not"),
    (schema_format({"type": "array", "uniqueItems": True}), SCHEMA, "uniqueItems"),
    (schema_format({"$ref": "http://elsewhere.test/schema"}), SCHEMA, "elsewhere"),
    (schema_format({"type": "string", "pattern": "(?=a)"}), SCHEMA, "look-around"),
    (schema_format({"allOf": [{"const": 1}, {"const": 2}]}), SCHEMA, "nsatisfiable"),
    (schema_format(deep(200)), SCHEMA, "recursion"),
    (schema_format({"enum": ["x" * 1000] * (MAX_GRAMMAR_BYTES // 1000 + 1)}), SCHEMA, "bytes"),
    (structured(regex="(a"), "structured_outputs.regex", "unclosed"),
    (structured(regex=""), "structured_outputs.regex", "required"),
    (structured(regex=5), "structured_outputs.regex", "string"),
    (structured(choice=[1]), "structured_outputs.choice[0]", "string"),
    (structured(grammar="begin: x"), "structured_outputs.grammar", "start"),
    (structured(grammar="root ::= ("), "structured_outputs.grammar", "grammar"),
    (
        structured(grammar='root ::= "a"' + " " * MAX_GRAMMAR_BYTES),
        "structured_outputs.grammar",
        "characters",
    ),
    (structured(json="{"), "structured_outputs.json", "JSON"),
    (structured(json=[1]), "structured_outputs.json", "schema"),
    (structured(json={}, regex="a"), "structured_outputs.regex", "combined"),
    (structured(whitespace_pattern=" "), "structured_outputs", "one of"),
    (structured(regex="a", whitespace_pattern=" "), "structured_outputs.whitespace_pattern", "json"),
    (structured(json={}, whitespace_pattern="("), "structured_outputs.json", "regex"),
    (
        structured(disable_additional_properties=True),
        "structured_outputs.disable_additional_properties",
        "schema",
    ),
    (structured(yaml=True), "structured_outputs.yaml", "Unknown"),
    ({**structured(regex="a"), **schema_format({})}, "structured_outputs", "response_format"),
    (structured(structural_tag='{"format": {}}'), "structured_outputs.structural_tag.format", "triggers"),
    ({"response_format": {**TAG, "triggers": []}}, "response_format.triggers", "empty"),
    ({"response_format": {**TAG, "triggers": ["["]}}, "response_format.structures[0].begin", "trigger"),
    ({"guided_json": {}}, "guided_json", "not supported"),
    ({"guided_choice": ["a"]}, "guided_choice", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "reason"), BAD, ids=[json.dumps(f)[:60] for f, _, _ in BAD])
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, server: ServerThread, fields: dict, param: str, reason: str
) -> None:
    for stream in (False, True):
        response = ask(http, "chat/completions", **fields, stream=stream)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param and reason in error["message"], error
        assert len(error["message"]) < 600 and "\n" not in error["message"]
    assert server.engine.requests == []


def test_what_the_engine_cannot_follow_is_refused_by_the_same_name(
    http: httpx.Client, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fields, param in ((structured(regex="a"), "structured_outputs.regex"), (schema_format({}), SCHEMA)):
        monkeypatch.setattr(server.engine, "refusal", InvalidRequest("Too complex.", param="grammar"))
        response = ask(http, "chat/completions", **fields)
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_responses_have_the_same_formats(http: httpx.Client, server: ServerThread) -> None:
    good = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    assert http.post("/v1/responses", json={"input": "Hi", "text": good}).status_code == 200
    assert matches(server.engine.requests[0].sampling.grammar, ANNA)
    bad = {"format": {"type": "json_schema", "name": "person", "schema": {"not": {}}}}
    response = http.post("/v1/responses", json={"input": "Hi", "text": bad})
    assert response.status_code == 400 and response.json()["error"]["param"] == "text.format.schema"


def test_a_grammar_is_looked_at_beside_the_event_loop(
    http: httpx.Client, server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, threads = threading.Event(), threading.Event(), []

    def slow(grammar: str, field: str) -> None:
        threads.append(threading.current_thread().name)
        begun.set()
        assert go.wait(30)
        raise InvalidRequest("No.", param=field)

    monkeypatch.setattr(structured_output, "check_grammar", slow)
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(ask(http, "completions", **structured(regex="slow thing")))
    )
    asking.start()
    assert begun.wait(30)
    with server.http() as other:
        assert ask(other, "completions").status_code == 200
    assert not answers
    go.set()
    asking.join(30)
    assert answers[0].status_code == 400 and threads[0].startswith("grammar-check")


# ---------------------------------------------------------------- gRPC


@pytest.fixture
def stub(server: ServerThread) -> Any:
    with server.channel() as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def generate(stub: Any, **sampling: Any) -> list[Any]:
    request = inference_pb2.GenerateRequest(
        model=BASE, prompt="Hello", sampling_params=inference_pb2.SamplingParams(**sampling)
    )
    return list(stub.Generate(request, timeout=20))


OVER_GRPC: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"json_schema": json.dumps(PERSON)}, structured(json=PERSON)),
    ({"regex": "a+"}, structured(regex="a+")),
    ({"choice": ["yes", "no"]}, structured(choice=["yes", "no"])),
    ({"grammar": 'start: "a"'}, structured(grammar='start: "a"')),
    ({"json_object": True}, {"response_format": {"type": "json_object"}}),
    ({"structural_tag": json.dumps(TAG)}, {"response_format": TAG}),
    ({"json_object": False}, {}),
]


@pytest.mark.parametrize(("sampling", "fields"), OVER_GRPC, ids=[str(s)[:40] for s, _ in OVER_GRPC])
def test_the_same_over_grpc(
    http: httpx.Client, stub: Any, server: ServerThread, sampling: dict, fields: dict
) -> None:
    assert generate(stub, **sampling)[-1].finish_reason == "stop"
    assert ask(http, "completions", **fields).status_code == 200
    one, other = server.engine.requests
    assert one.sampling.grammar == other.sampling.grammar


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"regex": "(a"}, "sampling_params.regex"),
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"json_schema": '{"not": {}}'}, "sampling_params.json_schema"),
        ({"json_schema": "{}", "choice": ["a"]}, "sampling_params.choice"),
        ({"grammar": "x"}, "sampling_params.grammar"),
    ],
    ids=str,
)
def test_refused_over_grpc(stub: Any, server: ServerThread, sampling: dict, param: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        generate(stub, **sampling)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert param in str(rpc_status.from_call(raised.value))
    assert server.engine.requests == []


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "json", "regex", "choice", "grammar", "json_schema", "name", "schema", "begin"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(form=_ANY, kinds=_ANY)
@settings(max_examples=150, deadline=None)
def test_whatever_is_sent_is_read_or_refused(form: Any, kinds: Any) -> None:
    try:
        found = structured_output.read_constraint(
            Fields({"response_format": form, "structured_outputs": kinds})
        )
    except InvalidRequest as error:
        assert error.param and error.param.split(".")[0] in ("response_format", "structured_outputs")
    else:
        assert bool(found.grammar) == bool(found.field)
