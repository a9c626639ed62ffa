"""What an answer has to look like: OpenAI's `response_format`, vLLM's `structured_outputs`, as grammars.

Reading makes the grammar's text; whether it is one is found out by `GrammarChecks` in a thread, before the
request goes to the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from coserve.grammar import MAX_GRAMMAR_BYTES, DeepThreads, check_grammar
from coserve.server.fields import Fields

# Between JSON's tokens: nothing, a space, or a new line with its indentation. A model that may go on with
# white space for ever sometimes does.
WHITESPACE = r" |\n {0,40}"
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_STRUCTURED = frozenset(
    {*KINDS, "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
)
_THREADS = 2
_KNOWN_GOOD = 512


class Constraint(NamedTuple):
    """The grammar that an answer has to match, and the field that asks for it; both "" where none does."""

    grammar: str = ""
    field: str = ""


def json_grammar(schema: Mapping[str, Any] | str, whitespace: str | None = WHITESPACE) -> str:
    """JSON that a schema allows. `whitespace`, a regular expression, is what may stand between its tokens;
    None: nothing."""
    options: Any = {"whitespace_flexible": False}
    if whitespace is not None:
        options = {"whitespace_pattern": whitespace}
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return LLMatcher.grammar_from_json_schema(text, overrides=options)


def choice_grammar(choices: list[str]) -> str:
    """One of these texts."""
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices)


def read_constraint(fields: Fields) -> Constraint:
    """From `response_format` or `structured_outputs`; InvalidRequest names what is wrong with either."""
    wanted = _response_format(fields)
    structured = fields.object("structured_outputs")
    if structured is None or not any(structured.has(name) for name in structured.body):
        return wanted
    if wanted.grammar:
        raise fields.fail("structured_outputs", "can't be combined with response_format.")
    structured.only(_STRUCTURED, "structured_outputs")
    if structured.has("disable_additional_properties"):
        raise structured.fail(
            "disable_additional_properties", "is not supported; write additionalProperties into the schema."
        )
    found = read_kind(structured)
    if not found.grammar:
        raise fields.fail("structured_outputs", f"must have one of {', '.join(KINDS)}.")
    for name in ("disable_any_whitespace", "whitespace_pattern"):
        if structured.has(name) and not (structured.has("json") or structured.has("json_object")):
            raise structured.fail(name, "needs json or json_object.")
    return found


def _response_format(fields: Fields) -> Constraint:
    form = fields.object("response_format")
    if form is None:
        return Constraint()
    kind = form.choice("type", ("text", "json_object", "json_schema", "structural_tag"))
    if kind is None:
        raise form.fail("type", "is required.")
    if kind == "text":
        return Constraint()
    if kind == "json_object":
        return Constraint(json_grammar({"type": "object"}), form.path.rstrip("."))
    if kind == "structural_tag":
        return Constraint(_structural_tag(form), form.path.rstrip("."))
    described = form.object("json_schema")
    if described is None:
        raise form.fail("json_schema", "is required with type json_schema.")
    described.required_string("name")
    described.string("name", max_length=64)
    described.string("description")
    described.boolean("strict")
    schema = described.object("schema")
    # Without a schema any object will do, as in JSON mode.
    body = {"type": "object"} if schema is None else schema.body
    return Constraint(_of_schema(described, "schema", body), f"{described.path}schema")


def read_kind(fields: Fields, json_name: str = "json") -> Constraint:
    """The one of vLLM's kinds that is there, if any; `json_name` is what a schema is called in `fields`."""
    names = [json_name if kind == "json" else kind for kind in KINDS]
    given = [name for name in names if fields.has(name) and fields.raw(name) is not False]
    if len(given) > 1:
        raise fields.fail(given[1], f"can't be combined with {given[0]}.")
    if not given:
        return Constraint()
    (name,) = given
    return Constraint(_READERS.get(name, _json)(fields, name), fields.path + name)


def _regex(fields: Fields, name: str) -> str:
    return LLMatcher.grammar_from_regex(fields.required_string(name))


def _json(fields: Fields, name: str) -> str:
    raw = fields.raw(name)
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise fields.fail(name, f"is not valid JSON: {error}.") from error
    if not isinstance(raw, Mapping):
        raise fields.fail(name, "must be a JSON schema: an object, or its text.")
    return _of_schema(fields, name, raw, _whitespace(fields))


def _json_object(fields: Fields, name: str) -> str:
    fields.boolean(name)
    return json_grammar({"type": "object"}, _whitespace(fields))


def _whitespace(fields: Fields) -> str | None:
    if fields.boolean("disable_any_whitespace"):
        return None
    return fields.string("whitespace_pattern", None, 200) or WHITESPACE


def _of_schema(
    fields: Fields, name: str, schema: Mapping[str, Any], whitespace: str | None = WHITESPACE
) -> str:
    try:
        return json_grammar(schema, whitespace)
    except (ValueError, RecursionError) as error:
        raise fields.fail(name, f"is not a JSON schema: {error}.") from error


def _choice(fields: Fields, name: str) -> str:
    choices = fields.strings(name) or []
    if not choices:
        raise fields.fail(name, "must hold at least one text.")
    return choice_grammar(choices)


def _grammar(fields: Fields, name: str) -> str:
    """Lark's form, or GBNF (`root ::= ...`) put into it."""
    text = fields.required_string(name)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise fields.fail(name, f"has {len(text)} characters; at most {MAX_GRAMMAR_BYTES} are allowed.")
    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the library raises errors of many kinds
        raise fields.fail(name, f"is not a grammar: {str(error)[:300]}") from error


def _tag_text(fields: Fields, name: str) -> str:
    try:
        described = json.loads(fields.required_string(name))
    except (ValueError, RecursionError) as error:
        raise fields.fail(name, f"is not valid JSON: {error}.") from error
    return _structural_tag(Fields(described, f"{fields.path}{name}."))


def _structural_tag(fields: Fields) -> str:
    """Free text in which what follows a trigger is one of `structures`: begin, JSON by a schema, end."""
    if fields.has("format"):
        raise fields.fail("format", "is not supported; use structures and triggers.")
    triggers = fields.strings("triggers") or []
    structures = fields.array("structures") or []
    if not triggers or not structures:
        raise fields.fail("structures" if triggers else "triggers", "must not be empty.")
    tags = []
    for place, raw in enumerate(structures):
        own = Fields(raw, f"{fields.path}structures[{place}].")
        begin = own.required_string("begin")
        trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
        if trigger is None:
            raise own.fail("begin", "must start with one of the triggers.")
        schema = own.object("schema") or Fields({})
        grammar = {**schema.body, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=grammar, end=own.string("end") or ""))
    return StructTag.to_grammar(tags, assume_special=False)


_READERS: dict[str, Callable[[Fields, str], str]] = {
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _tag_text,
}


class GrammarChecks:
    """Whether grammars are any, found out in threads; those that are known to be are remembered."""

    def __init__(self) -> None:
        self._threads = DeepThreads(_THREADS, "grammar-check")
        self._good: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, grammar: str, field: str) -> None:
        """Raise InvalidRequest, naming `field`, for what isn't a grammar or is too large."""
        key = hashlib.blake2b(grammar.encode("utf-8", errors="replace"), digest_size=16).digest()
        if key in self._good:
            self._good.move_to_end(key)
            return
        await asyncio.wrap_future(self._threads.submit(check_grammar, grammar, field))
        self._good[key] = None
        while len(self._good) > _KNOWN_GOOD:
            self._good.popitem(last=False)
