"""Grammars (llguidance's Lark) that hold an answer to calls of given functions, in a model's own format.

Spacing is fixed to what templates show calls in, so that a model can't wander off in white space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from coserve.errors import InvalidRequest
from coserve.grammar import check_grammar
from coserve.server.application.reasoning import ReasoningFormat
from coserve.server.application.tool_calling.formats import ToolFormat
from coserve.server.application.tool_calling.request import Function
from coserve.server.application.tool_calling.xml_reader import takes_text

TokenId = Callable[[str], int | None]  # of a text that is one added token
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_COMBINED = frozenset({"anyOf", "oneOf", "allOf", "$ref", "enum", "const"})
_TEXT = "TEXT: /(.|\\n)+/"
_END_VALUE = "\n</parameter>\n"


def calls_grammar(
    form: ToolFormat, functions: Sequence[Function], token_id: TokenId, *, parallel: bool, text: bool
) -> str:
    """Calls of `functions`: one, with `parallel` more. With `text` also none, and text around them.

    Raises InvalidRequest naming the tool whose parameters can't be compiled.
    """
    grammar = _grammar(form, functions, token_id, parallel, text)
    try:
        _check(grammar)
    except InvalidRequest:
        for function in functions:
            param = f"tools[{function.place}].function.parameters"
            check_grammar(_json(_schema(function), "start"), param)
        raise
    return grammar


@lru_cache(maxsize=256)
def _check(grammar: str) -> None:
    """Agents bring the same tools again and again: what was good before is."""
    check_grammar(grammar, "tools")


def _grammar(
    form: ToolFormat, functions: Sequence[Function], token_id: TokenId, parallel: bool, text: bool
) -> str:
    block = None if form.bare else form.blocks[0]
    opening = _mark(block.open, token_id) if block is not None else ""
    closing = _mark(block.close, token_id) if block is not None and block.close else ""
    if form.listed:
        more = '(", " call)*' if parallel else ""
        body = f'" "? "[" call {more} "]" {closing}'
    elif block is not None and closing:
        body = f'"\\n" call "\\n" {closing}'
    else:
        body = "call"
    joint = '"\\n"' if closing else '"; "' if block is None else ""
    again = f"({joint} {opening} body)*" if parallel and not form.listed else ""
    rules = [f"body: {body}", *_calls(form, functions, token_id)]
    if not text:
        return "\n".join([f"start: {opening} body {again}", *rules])
    if block is None:
        first = "".join(f"\\{char}" for char in form.bare)
        return "\n".join([f"start: body {again} | OTHER?", f"OTHER: /[^\\s{first}](.|\\n)*/", *rules])
    times = "*" if parallel else "?"
    if opening.startswith("<"):
        return "\n".join([f"start: TEXT? ({opening} body TEXT?){times}", _TEXT, *rules])
    lead = f"lead[lazy]: TEXT? {opening}"
    return "\n".join([f"start: (lead body){times} TEXT?", lead, _TEXT, *rules])


def with_reasoning(grammar: str, form: ReasoningFormat, inside: bool, token_id: TokenId) -> str:
    """`grammar` for what follows the reasoning; `inside`: an answer begins within it."""
    close = _mark(form.close, token_id)
    thought = "thought: TEXT? " + close
    if not close.startswith("<"):
        thought = f"thought[suffix={close}]: /(.|\\n)*/"
    thinking = "thought BREAKS" if inside else f"({_mark(form.open, token_id)} thought BREAKS)?"
    lark = f"start: {thinking} @answer\n{thought}\nBREAKS: /\\n{{0,2}}/\n{_TEXT}"
    return _joined(lark, {"answer": grammar})


def either(calls: str, body: str) -> str:
    """Calls, or what the other grammar wants of the text."""
    return _joined("start: @calls | @body", {"calls": calls, "body": body})


def _joined(lark: str, parts: Mapping[str, str]) -> str:
    grammars: list[dict[str, Any]] = [{"name": "main", "lark_grammar": lark}]
    for name, grammar in parts.items():
        listed = json.loads(grammar)["grammars"] if grammar.lstrip().startswith("{") else None
        first, *others = listed or [{"lark_grammar": grammar}]
        grammars += [{**first, "name": name}, *others]
    return json.dumps({"grammars": grammars})


def _mark(text: str, token_id: TokenId) -> str:
    found = token_id(text)
    return f"<[{found}]>" if found is not None else json.dumps(text)


def _schema(function: Function) -> dict[str, Any]:
    """The parameters as an object, without keys of the model's own; a schema that isn't strict is followed
    as far as it can be compiled."""
    schema = dict(function.parameters)
    if not schema.keys() & _COMBINED:
        schema.setdefault("type", "object")
        if isinstance(schema.get("properties"), Mapping):
            schema.setdefault("additionalProperties", False)
    return {**schema, "x-guidance": {**_SPACING, "lenient": not function.strict}}


def _json(schema: Mapping[str, Any], rule: str) -> str:
    return f"{rule}: %json {json.dumps(schema)}"


def _calls(form: ToolFormat, functions: Sequence[Function], token_id: TokenId) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        if form.kind == "xml":
            rules += _xml_call(number, function)
            continue
        if form.kind == "mistral" and not form.listed:
            arguments = _mark("[ARGS]", token_id)
            rules.append(f"call_{number}: {json.dumps(function.name)} {arguments} args_{number}")
        else:
            head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{form.arguments}": '
            rules.append(f'call_{number}: {json.dumps(head)} args_{number} "}}"')
        rules.append(_json(_schema(function), f"args_{number}"))
    if form.kind == "xml":
        rules.append(f"value_text[suffix={json.dumps(_END_VALUE)}]: /(.|\\n)*/")
    return rules


def _xml_call(number: int, function: Function) -> list[str]:
    """Parameters in the schema's order, those it doesn't require maybe left out."""
    schema = _schema(function)
    properties, required = schema.get("properties", {}), schema.get("required", ())
    shared: dict[str, Any] = {
        key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema
    }
    sequence, rules = [], []
    for place, (key, value) in enumerate(properties.items()):
        rule = f"param_{number}_{place}"
        sequence.append(rule if key in required else f"{rule}?")
        rules.append(f"{rule}: {json.dumps(f'<parameter={key}>' + chr(10))} {_xml_value(value, shared)}")
    head = json.dumps(f"<function={function.name}>\n")
    return [f'call_{number}: {head} {" ".join(sequence)} "</function>"', *rules]


def _xml_value(schema: object, shared: Mapping[str, Any]) -> str:
    end = json.dumps(_END_VALUE)
    if isinstance(schema, Mapping) and not takes_text(schema):
        return f"%json {json.dumps({**schema, **shared})} {end}"
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(values, list) and values:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f"({' | '.join(json.dumps(text) for text in texts)}) {end}"
    return "value_text"
