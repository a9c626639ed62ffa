"""Readers of tool calls and reasoning: however the text is cut, nothing is lost and all pieces agree."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coserve.errors import ConfigError
from coserve.server.application import reasoning
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Piece, Reasoning
from coserve.server.application.reasoning import ReasoningFormat, ReasoningParser, begins_inside
from coserve.server.application.tool_calling.formats import FORMATS, JSON_LIST, PARSERS, choose
from coserve.server.application.tool_calling.parser import ToolCallParser
from tests.server.fake_engine import TOKENIZER

SCHEMAS = {
    "f": {"properties": {"x": {"type": "integer"}, "s": {"type": "string"}}},
    "get": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "o": {"type": "object"}}},
}
FORMS = [*FORMATS.values(), JSON_LIST]


def read(form, text: str, cuts: Sequence[int] = (), limit: int | None = None):
    """(content, calls, pieces) of a text fed in parts."""
    parser = ToolCallParser(form, SCHEMAS, limit)
    pieces: list[Piece] = []
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        pieces += parser.feed(text[start:end])
        assert 0 <= parser.held <= end
    pieces += parser.finish()
    assert parser.held == 0
    content, calls = "", []
    for piece in pieces:
        match piece:
            case Content(part):
                content += part
            case CallOpened(index, _, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, part):
                assert index == len(calls) - 1
                calls[index][1] += part
    assert parser.calls == len(calls)
    return content, [tuple(call) for call in calls], pieces


HERMES_CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
ARGS = {"city": "Köln", "days": 2}
JSON = '{"city": "Köln", "days": 2}'
FILLED = {"JSON": JSON, "TEXT": json.dumps(JSON, ensure_ascii=False), "KEYS": 'city="Köln", days=2'}


def filled(text: str) -> str:
    """A sample with the arguments in the form that it names."""
    for word, value in FILLED.items():
        text = text.replace(word, value)
    return text


WHOLE = [
    ("hermes", HERMES_CALL, 1),
    ("hermes", HERMES_CALL + "\n" + HERMES_CALL, 2),
    ("hermes", '<tool_call>[{"name": "get", "arguments": JSON}]</tool_call>', 1),
    ("hermes", '<tool_call>{"arguments": JSON, "name": "get"}</tool_call>', 1),
    ("hermes", '<tool_call>{"name": "get", "arguments": TEXT}</tool_call>', 1),
    ("hermes", '<tool_call>{"name": "get", "arguments": JSON</tool_call>', 1),
    ("llama3_json", '{"name": "get", "parameters": JSON}', 1),
    ("llama3_json", '<|python_tag|>{"name": "get", "parameters": JSON}', 1),
    ("llama3_json", '{"type": "function", "name": "get", "parameters": JSON}', 1),
    ("llama3_json", '{"type": "function", "function": "get", "parameters": JSON}', 1),
    ("llama3_json", '; '.join(['{"name": "get", "parameters": JSON}'] * 2), 2),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": JSON, "id": "123456789"}]', 1),
    ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": JSON}, '
     '{"name": "get", "arguments": JSON}]', 2),
    ("mistral", '[TOOL_CALLS]getJSON[TOOL_CALLS]getJSON', 2),
    ("mistral", '[TOOL_CALLS]get[CALL_ID]abc[ARGS]JSON', 1),
    ("phi4_mini_json", 'functools[{"name": "get", "arguments": JSON}]', 1),
    ("phi4_mini_json", '<|tool_call|>[{"name": "get", "arguments": JSON}]<|/tool_call|>', 1),
    ("granite", '<|tool_call|>[{"name": "get", "arguments": JSON}]', 1),
    ("qwen3_coder", "<tool_call>\n<function=get>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n"
     "</parameter>\n</function>\n</tool_call>", 1),
    ("qwen3_coder", "<function=get><parameter=city>Köln</parameter><parameter=days>2</parameter>"
     "</function>", 1),
    ("pythonic", '[get(KEYS), get(city=\'Köln\', days=2)]', 2),
    ("llama4_pythonic", '<|python_start|>[get(KEYS)]<|python_end|>', 1),
    ("olmo3", '<function_calls>get(KEYS)\nget(KEYS)</function_calls>', 2),
    ("json", '[{"name": "get", "arguments": JSON}]', 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "count"), WHOLE)
def test_each_format_whole_and_one_character_at_a_time(name: str, text: str, count: int) -> None:
    form, text = (JSON_LIST if name == "json" else FORMATS[name]), filled(text)
    content, calls, _ = read(form, text)
    assert content == "" and [(n, json.loads(a)) for n, a in calls] == [("get", ARGS)] * count
    assert read(form, text, range(len(text)))[:2] == (content, calls)


PARTS = [
    "a", " ", "\n", "世", "<", "<tool", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", "}", "[", "]",
    '"', "\\", ",", ";", ":", '{"name": "f", "arguments": {"x": 1}}',
    '{"name": "f", "parameters": {"s": "a}\\"b"}}',
    HERMES_CALL, '{"name": "g", "arguments": {}}', '{"name": "f"}', '{"x": 1}', '"arguments": {', "functools",
    "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>", "<function=f>", "<parameter=x>", "<parameter=s>",
    "\n1\n", "</parameter>", "</function>", "f(", "x=1", "s='a, b)'", ")", "<function_calls>",
    "</function_calls>", "f{", "[ARGS]", "[f(x=1)]", "9" * 600, "<|python_start|>", "<|python_end|>",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=10), data=st.data())
def test_pieces_do_not_depend_on_the_cuts(form, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    whole, cut = read(form, text), read(form, text, cuts)
    assert whole[:2] == cut[:2]
    if not whole[1]:
        assert whole[0] == text


NO_CALLS = [
    '{"arguments": {"x": 1e999}, "name": "f"}',
    '{"arguments": {"x": NaN}, "name": "f"}',
    "{}",
    "nonsense",
    '{"name": 5}',
    '{"name": "f", "arguments": 3}',
    "[" * 5000,
    '{"name": "\\ud800"}',
    "",
]


@pytest.mark.parametrize("block", NO_CALLS, ids=range(len(NO_CALLS)))
def test_blocks_that_are_no_calls_are_content(block: str) -> None:
    text = f"See: <tool_call>{block}</tool_call> there."
    assert read(FORMATS["hermes"], text)[:2] == (text, [])
    assert read(FORMATS["hermes"], text[:-20], range(len(text) - 20))[:2] == (text[:-20], [])


def test_what_is_no_call_is_held_back_no_longer_than_that_is_open() -> None:
    begun = {"hermes": '<tool_call>{"x": 1', "qwen3_coder": "<tool_call>\nwell", "pythonic": "[1, 2"}
    for name, text in begun.items():
        pieces = ToolCallParser(FORMATS[name], SCHEMAS).feed(text)
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == text
    assert len(read(FORMATS["hermes"], "<tool_call>Hm. " + HERMES_CALL)[1]) == 1


def test_text_around_calls_is_kept_and_white_space_beside_them_dropped() -> None:
    text = f"Let me see.\n\n{HERMES_CALL}\nAnd then\n{HERMES_CALL}\n"
    content, calls, _ = read(FORMATS["hermes"], text, range(len(text)))
    assert content == "Let me see.\nAnd then" and len(calls) == 2
    assert read(FORMATS["hermes"], "\n " + HERMES_CALL + "\n\nDone.")[0] == "Done."
    assert read(FORMATS["hermes"], " plain \n")[0] == " plain \n"


def test_arguments_come_as_they_are_generated() -> None:
    head, tail = '<tool_call>\n{"name": "f", "arguments": {"s": "one', ' two"}}\n</tool_call>'
    parser = ToolCallParser(FORMATS["hermes"], SCHEMAS)
    opened, begun = parser.feed(head)
    assert isinstance(opened, CallOpened) and begun == CallArguments(0, '{"s": "one')
    assert parser.feed(tail) == [CallArguments(0, ' two"}')] and not parser.cut
    parser = ToolCallParser(FORMATS["qwen3_coder"], SCHEMAS)
    pieces = parser.feed("<tool_call>\n<function=f>\n<parameter=s>\nline one\nline")
    assert "".join(p.text for p in pieces if isinstance(p, CallArguments)) == '{"s": "line one\\nline'


def test_a_mark_within_a_string_ends_nothing() -> None:
    arguments = '{"s": "</tool_call> \\" <tool_call>"}'
    text = '<tool_call>{"name": "f", "arguments": ' + arguments + "}</tool_call>"
    assert read(FORMATS["hermes"], text, range(len(text)))[:2] == ("", [("f", arguments)])


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_a_cut_call_keeps_what_was_said_of_it(form) -> None:
    _, text, count = next(w for w in WHOLE if w[0] == form.name)
    text = filled(text)
    for end in range(len(text)):
        content, calls, _ = read(form, text[:end])
        if calls:
            assert calls[0][0] == "get" and (content == "" or count > 1)
            whole = read(form, text)[1][0][1]
            assert form.kind == "xml" or whole.startswith(calls[0][1])
        else:
            assert content == text[:end]


def test_calls_without_a_mark_name_tools_that_there_are() -> None:
    for text in ('{"name": "Bob", "parameters": {"age": 3}}', '{"answer": 42}', "{not json"):
        assert read(FORMATS["llama3_json"], text, range(len(text)))[:2] == (text, [])
    for text in ("[1, 2, 3]", "[link](http://x)", "[nothing(1)]"):
        assert read(FORMATS["pythonic"], text, range(len(text)))[:2] == (text, [])
    assert read(FORMATS["phi4_mini_json"], "use functools.partial here")[0] == "use functools.partial here"


def test_parallel_calls_can_be_limited() -> None:
    content, calls, _ = read(FORMATS["hermes"], HERMES_CALL * 3 + " end", limit=1)
    assert len(calls) == 1 and content == "end"


def test_values_by_their_types() -> None:
    text = (
        "<tool_call><function=get><parameter=city>\n12\n</parameter><parameter=days>\nmany\n</parameter>"
        '<parameter=o>\n{"a": [1]}\n</parameter></function></tool_call>'
    )
    (call,) = read(FORMATS["qwen3_coder"], text)[1]
    assert json.loads(call[1]) == {"city": "12", "days": "many", "o": {"a": [1]}}
    text = "<tool_call><function=get><parameter=days>{}</parameter></function></tool_call>"
    for odd in ("NaN", "1e999", "[1, Infinity]"):  # no JSON
        assert json.loads(read(FORMATS["qwen3_coder"], text.format(odd))[1][0][1]) == {"days": odd}
        assert json.loads(read(FORMATS["pythonic"], f"[f(x={odd})]")[1][0][1]) == {"x": odd}
    (call,) = read(FORMATS["pythonic"], "[f(x={'a': (1, None)}, s=true, y=[1.5, 'b)'])]")[1]
    assert json.loads(call[1]) == {"x": {"a": [1, None]}, "s": True, "y": [1.5, "b)"]}


def test_mistral_s_templates_want_ids_of_nine_characters() -> None:
    assert {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"} == set(FORMATS["mistral"].marks)  # tokens that are shown
    _, _, pieces = read(FORMATS["mistral"], '[TOOL_CALLS][{"name": "f", "arguments": {}}]')
    assert isinstance(pieces[0], CallOpened) and len(pieces[0].id) == 9 and pieces[0].id.isalnum()


SHOWN = [
    ("{% if tools %}<tool_call>", "hermes"),
    ("{% if tools %}<tool_call>\n<function=x>", "qwen3_coder"),
    ("{{ tools }}[TOOL_CALLS]", "mistral"),
    ("{{ tools }}[TOOL_CALLS]name[ARGS]", "mistral"),
    ("{{ tools }}<|tool|>x<|/tool|>", "phi4_mini_json"),
    ("{{ tools }}<|python_tag|>", "llama3_json"),
    ("{{ messages }}", "hermes"),
    ("{{ tools }}", None),
    (None, None),
]


def test_formats_are_found_in_templates() -> None:
    for template, name in SHOWN:
        form = choose("auto", template)
        assert (form.name if form is not None else None) == name
    assert not choose("auto", SHOWN[3][0]).listed and choose("auto", SHOWN[2][0]).listed
    assert choose("phi4_mini_json", "functools[").blocks[0].open == "functools"
    assert choose("auto", "{{ tools }}<|python_tag|> only supports single tool-calls").single
    assert choose("none", SHOWN[0][0]) is None and choose("auto", TOKENIZER.chat_template).name == "hermes"
    assert all(choose(name, None) is not None for name in PARSERS if name not in ("auto", "none"))
    with pytest.raises(ConfigError, match="--tool-call-parser 'nix'"):
        choose("nix", None)


# ------------------------------------------------------------------ reasoning


def think(text: str, cuts: Sequence[int] = (), inside: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(ReasoningFormat(), inside)
    pieces: list[Piece] = []
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        pieces += parser.feed(text[start:end])
        assert 0 <= parser.held <= end
    pieces += parser.finish()
    kinds = [type(piece) for piece in pieces]
    assert kinds == sorted(kinds, key=lambda kind: kind is Content)
    return tuple("".join(p.text for p in pieces if isinstance(p, kind)) for kind in (Reasoning, Content))


def test_reasoning() -> None:
    assert think("<think>\nHm.\nSo\n</think>\n\nYes.\n") == ("Hm.\nSo", "Yes.\n")
    assert think("Hm.</think>Yes.", inside=True) == ("Hm.", "Yes.")
    assert think("<think>Hm.</think>Yes.", inside=True) == ("Hm.", "Yes.")
    assert think("Yes. <think>no</think>") == ("", "Yes. <think>no</think>")
    assert think("<think>Hm. <thi") == ("Hm. <thi", "")
    assert think("\n<thi") == ("", "\n<thi")
    assert think("<think></think>") == ("", "")


THOUGHTS = ["a", "\n", " ", "<think>", "</think>", "<thi", "</", "<tool_call>"]


@given(st.lists(st.sampled_from(THOUGHTS), max_size=8), st.booleans(), st.data())
def test_reasoning_does_not_depend_on_the_cuts(parts: list[str], inside: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert think(text, cuts, inside) == think(text, (), inside)


def test_whether_an_answer_begins_within_reasoning_is_read_from_the_prompt() -> None:
    form = reasoning.choose("auto", "{{ x }}<think>\n</think>")
    assert form is not None and reasoning.choose("auto", "{{ x }}") is None
    assert begins_inside(form, "user: <think></think>\nassistant: ", "") is False
    assert begins_inside(form, "assistant: <think>\n", "") is True
    assert begins_inside(form, "assistant: <think>\n\n</think>\n\n", "") is None
    assert begins_inside(form, "assistant: <think> well", "<think> well") is True
    assert begins_inside(reasoning.choose("deepseek_r1", None), "assistant: ", "") is True
    with pytest.raises(ConfigError, match="--reasoning-parser 'nix'"):
        reasoning.choose("nix", None)
