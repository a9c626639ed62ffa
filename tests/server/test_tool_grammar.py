"""Grammars of demanded and strict calls: what they allow is read back as calls that keep to the schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

from coserve.grammar import GrammarVocabulary
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Piece
from coserve.server.application.reasoning import ReasoningFormat
from coserve.server.application.tool_calling.formats import FORMATS, HERMES, JSON_LIST, ToolFormat, choose
from coserve.server.application.tool_calling.grammar import calls_grammar, either, with_reasoning
from coserve.server.application.tool_calling.parser import ToolCallParser
from coserve.server.application.tool_calling.request import Function
from coserve.tokenizer import Tokenizer
from tests import shared_data
from tests.server.fake_engine import MODEL, TOKENIZER

END = TOKENIZER.eos_token_ids[0]
VOCABULARY = GrammarVocabulary(TOKENIZER, MODEL.vocab_size, [END])
UNIT = {"type": "string", "enum": ["C", "°F"]}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"$ref": "#/$defs/unit"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "tags"],
    "$defs": {"unit": UNIT},
}
FUNCTIONS = (
    Function("get.weather", PARAMETERS, False, 0),
    Function("now", {"type": "object", "properties": {}}, True, 1),
)
SCHEMAS = {function.name: function.parameters for function in FUNCTIONS}
NAMED_MISTRAL = choose("auto", "{{ tools }}[TOOL_CALLS]f[ARGS]")
FORMS = [form for form in FORMATS.values() if form.kind != "python"] + [JSON_LIST, NAMED_MISTRAL]
IDS = [f"{form.name}{'' if form.listed else '-each'}" for form in FORMS]
MARKED = [form for form in FORMS if not form.bare]


def token_id(text: str) -> int | None:
    return TOKENIZER.added_token_id(text)


def read(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(form, SCHEMAS)
    pieces: list[Piece] = parser.feed(text) + parser.finish()
    names = [piece.name for piece in pieces if isinstance(piece, CallOpened)]
    arguments = [""] * len(names)
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments[piece.index] += piece.text
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return content, list(zip(names, arguments, strict=True))


def allows(grammar: str, text: str, tokenizer: Tokenizer = TOKENIZER) -> bool:
    """Whether a text is one that the grammar lets the output be, to its end."""
    matcher = VOCABULARY.compile(grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


END_VALUE = TOKENIZER.encode("\n</parameter>\n", add_special_tokens=False)


def walk(matcher: LLMatcher, seed: int, steps: int = 400) -> str:
    """What comes of choosing among the allowed tokens at random, with an end now and then where it may be."""
    chance = random.Random(seed)
    ids: list[int] = []
    for _ in range(steps):
        if len(ids) % 8 == 7 and matcher.validate_tokens(END_VALUE) == len(END_VALUE):
            choices = END_VALUE
        else:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = [int(token) for token in bits.nonzero()[0]]
            if allowed == [END] or (END in allowed and chance.random() < 0.7):
                return TOKENIZER.decode(ids, skip_special_tokens=False)
            choices = [chance.choice([token for token in allowed if token != END])]
        assert matcher.consume_tokens(choices)
        ids += choices
    raise AssertionError(f"no end: {TOKENIZER.decode(ids, skip_special_tokens=False)!r}")


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_all_that_a_grammar_allows_is_read_as_calls(form: ToolFormat, parallel: bool) -> None:
    grammar = calls_grammar(form, FUNCTIONS, token_id, parallel=parallel, text=False)
    matcher = VOCABULARY.compile(grammar)
    counts = set()
    for seed in range(8):
        content, calls = read(form, walk(matcher.deep_copy(), seed))
        assert content == "" and (len(calls) == 1 or parallel)
        counts.add(len(calls))
        for name, arguments in calls:
            values = json.loads(arguments)
            if form.kind == "xml":  # a string as it stands there is as long as it likes
                values["city"] = values.get("city", "")[:12]
                jsonschema.validate(
                    values, {**SCHEMAS[name], "required": SCHEMAS[name].get("required", [])[1:]}
                )
            else:
                jsonschema.validate(values, SCHEMAS[name])
    assert parallel is False or max(counts) > 1


SUNNY = ("get.weather", {"city": 'Kö"ln', "tags": [True]})


def written(form: ToolFormat, name: str, arguments: dict[str, Any]) -> str:
    """One call as a model of this family writes it."""
    text = json.dumps(arguments, ensure_ascii=False)
    call = json.dumps({"name": name, form.arguments: arguments}, ensure_ascii=False)
    block = form.blocks[0] if not form.bare else None
    if form.kind == "xml":
        values = [
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        ]
        call = f"<function={name}>\n{''.join(values)}</function>"
    if form.kind == "mistral" and not form.listed:
        return f"{block.open}{name}[ARGS]{text}"
    if form.listed:
        return f"{block.open if block else ''}[{call}]{block.close if block else ''}"
    return f"{block.open}\n{call}\n{block.close}" if block and block.close else call


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_grammars_allow_what_models_write(form: ToolFormat) -> None:
    grammar = calls_grammar(form, FUNCTIONS, token_id, parallel=False, text=False)
    text = written(form, *SUNNY)
    assert allows(grammar, text) and allows(grammar, written(form, "now", {}))
    content, ((name, arguments),) = read(form, text)
    assert (content, name, json.loads(arguments)) == ("", *SUNNY)
    for wrong in (
        text.replace("true", "1"),
        text.replace("tags", "tag"),
        text.replace("get.weather", "then"),
        "Hi",
    ):
        assert not allows(grammar, wrong), wrong


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_names_in_any_alphabet(form: ToolFormat) -> None:
    unit = {"type": "string", "enum": ["°C", 'K"x']}
    schema = {"type": "object", "properties": {"größe": unit}, "required": ["größe"]}
    grammar = calls_grammar(
        form, [Function("2-größe👋", schema, True, 0)], token_id, parallel=False, text=False
    )
    for value in unit["enum"]:
        text = written(form, "2-größe👋", {"größe": value})
        ((name, arguments),) = read(form, text)[1] if not form.bare else [("2-größe👋", text)]
        assert allows(grammar, text) and name == "2-größe👋"
        assert form.bare or json.loads(arguments) == {"größe": value}


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_text_is_free_around_strict_calls(form: ToolFormat) -> None:
    grammar = calls_grammar(form, FUNCTIONS, token_id, parallel=True, text=True)
    call = written(form, *SUNNY)
    assert allows(grammar, "Hello, {you} [there].") and allows(grammar, call)
    assert not allows(grammar, call.replace("true", "1"))
    if form in MARKED:
        assert allows(grammar, f"Let me see.\n{call}\nDone.") and allows(grammar, f"{call}\nThen\n{call}")
        assert not allows(grammar, "Let me see.\n" + call.replace("true", "1"))


BODY = LLMatcher.grammar_from_json_schema({"type": "object"})
THINK = ReasoningFormat()


def test_reasoning_comes_before() -> None:
    calls = calls_grammar(HERMES, FUNCTIONS, token_id, parallel=True, text=False)
    call = written(HERMES, *SUNNY)
    for grammar, answer, other in (
        (BODY, '{"a": 1}', "Hi"),
        (calls, call, "Hi"),
        (either(calls, BODY), call, "Hi"),
    ):
        inside = with_reasoning(grammar, THINK, True, token_id)
        outside = with_reasoning(grammar, THINK, False, token_id)
        assert allows(inside, f"Hm.\n{{so}}\n</think>\n\n{answer}") and not allows(inside, answer)
        assert allows(outside, f"<think>\nHm.</think>\n{answer}") and allows(outside, answer)
        assert not allows(inside, f"Hm.</think>{other}") and not allows(outside, f"<think>Hm.</think>{other}")
    assert allows(either(calls, BODY), '{"a": 1}') and not allows(either(calls, BODY), "Hi")
    lark = with_reasoning('start: "yes" | "no"', ReasoningFormat("[THINK]", "[/THINK]"), False, token_id)
    assert allows(lark, "[THINK]Is it?[/THINK]no") and not allows(lark, "maybe")


def _openai(schema: Any) -> Any:
    """A schema of the leaderboard, whose types are Python's, with JSON's."""
    names = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    if isinstance(schema, dict):
        return {
            key: names.get(value, value) if key == "type" and isinstance(value, str) else _openai(value)
            for key, value in schema.items()
        }
    return [_openai(value) for value in schema] if isinstance(schema, list) else schema


def test_the_functions_of_a_leaderboard() -> None:
    for question, answer in shared_data.bfcl()[:40]:
        ((name, values),) = answer["ground_truth"][0].items()
        (function,) = [f for f in question["function"] if f["name"] == name]
        schema = _openai(function["parameters"])
        arguments = {key: choices[0] for key, choices in values.items() if choices[0] != ""}
        ordered = {key: arguments[key] for key in schema.get("properties", arguments) if key in arguments}
        try:
            jsonschema.validate(ordered, schema)
        except jsonschema.ValidationError:
            continue  # answers with nested choices
        grammar = calls_grammar(
            HERMES, [Function(name, schema, False, 0)], token_id, parallel=False, text=False
        )
        text = written(HERMES, name, ordered)
        assert allows(grammar, text), text
        assert read(HERMES, text)[1] == [(name, json.dumps(ordered, ensure_ascii=False))]


def test_the_calls_of_conversations_are_read_as_they_were() -> None:
    for row in shared_data.glaive()[:100]:
        for turn in row["conversations"]:
            if turn["from"] != "function_call":
                continue
            call = json.loads(turn["value"])
            message = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
            shown = TOKENIZER.render_chat([message], add_generation_prompt=False)
            ((name, arguments),) = read(
                HERMES, shown.partition("assistant\n")[2].removesuffix("<|im_end|>\n")
            )[1]
            assert name == call["name"] and json.loads(arguments) == call["arguments"]
