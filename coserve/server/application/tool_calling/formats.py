"""The formats that models write tool calls in, by vLLM's names, and which one a chat template asks for."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coserve.errors import ConfigError
from coserve.server.application.tool_calling.events import Reader
from coserve.server.application.tool_calling.json_reader import JsonReader
from coserve.server.application.tool_calling.mistral_reader import MistralReader
from coserve.server.application.tool_calling.python_reader import PythonReader
from coserve.server.application.tool_calling.xml_reader import XmlReader

Schemas = Mapping[str, Mapping[str, Any]]  # parameters of the tools by name


@dataclass(frozen=True)
class Block:
    """Where calls stand: from `open` to `close`. Of no `close`: as far as they go.

    `kept`: the opening mark is part of the call itself.
    """

    open: str
    close: str = ""
    kept: bool = False


def _uuid() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _nine() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    `bare`: the characters that an answer made of calls alone begins with, where it may have no mark.
    `arguments` is the key that holds them where calls are JSON; `listed`: a JSON list holds a block's calls;
    `single`: the template takes one call a turn; `inner`: marks within a block.
    """

    name: str
    kind: str = "json"
    blocks: tuple[Block, ...] = ()
    bare: str = ""
    arguments: str = "arguments"
    listed: bool = False
    single: bool = False
    inner: tuple[str, ...] = ()
    new_id: Callable[[], str] = _uuid

    def reader(self, block: Block | None, schemas: Schemas) -> Reader:
        """For the text that follows a block's opening mark; None is calls without one, which have to name
        tools that there are."""
        opening, close = (block.open, block.close) if block is not None and not block.kept else ("", "")
        names = frozenset(schemas) if block is None else None
        if self.kind == "xml":
            return XmlReader(opening, close, schemas)
        if self.kind == "mistral":
            return MistralReader(opening)
        if self.kind == "python":
            return PythonReader(opening, close, names, listed=block is None)
        return JsonReader(opening, close, names)

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that say something by themselves, special tokens maybe."""
        return tuple(mark for block in self.blocks for mark in (block.open, block.close) if mark) + self.inner


HERMES = ToolFormat("hermes", blocks=(Block("<tool_call>", "</tool_call>"),))
# What forced calls are written in where a family's own form can't be held to a JSON schema.
JSON_LIST = ToolFormat("json", bare="[{", listed=True)

FORMATS = {
    form.name: form
    for form in (
        HERMES,
        ToolFormat("llama3_json", blocks=(Block("<|python_tag|>"),), bare="{", arguments="parameters"),
        ToolFormat(
            "mistral",
            "mistral",
            (Block("[TOOL_CALLS]"),),
            listed=True,
            inner=("[CALL_ID]", "[ARGS]"),
            new_id=_nine,
        ),
        ToolFormat(
            "phi4_mini_json",
            blocks=(Block("<|tool_call|>", "<|/tool_call|>"), Block("functools")),
            listed=True,
        ),
        ToolFormat("granite", blocks=(Block("<|tool_call|>"), Block("<tool_call>")), listed=True),
        ToolFormat(
            "qwen3_coder", "xml", (Block("<tool_call>", "</tool_call>"), Block("<function=", kept=True))
        ),
        ToolFormat("pythonic", "python", bare="["),
        ToolFormat("llama4_pythonic", "python", (Block("<|python_start|>", "<|python_end|>"),), bare="["),
        ToolFormat("olmo3", "python", (Block("<function_calls>", "</function_calls>"),)),
    )
}
_SAME = {"llama4_json": "llama3_json", "qwen3_xml": "qwen3_coder"}
PARSERS = ("auto", "none", *FORMATS, *_SAME)

_SIGNS = (  # in a template that knows tools; the first that stands in it decides
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|/tool_call|>", "phi4_mini_json"),
    ("<|/tool|>", "phi4_mini_json"),
    ("functools[", "phi4_mini_json"),
    ("<|tool_call|>", "granite"),
    ("<function_calls>", "olmo3"),
    ("<|python_start|>", "llama4_pythonic"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)


def choose(parser: str, template: str | None) -> ToolFormat | None:
    """The format of a `--tool-call-parser`: by name, none, or ("auto") the one that the template shows.

    Raises ConfigError for an unknown name.
    """
    if parser == "none":
        return None
    if parser != "auto":
        form = FORMATS.get(_SAME.get(parser, parser))
        if form is None:
            raise ConfigError(
                f"--tool-call-parser {parser!r} is unknown; take one of {', '.join(PARSERS)}",
                param="tool_call_parser",
            )
        return _variant(form, template)
    if template is None:
        return None
    if "tools" not in template and "tool_calls" not in template:
        return HERMES
    found = next((FORMATS[name] for sign, name in _SIGNS if sign in template), None)
    return _variant(found, template) if found is not None else None


def _variant(form: ToolFormat, template: str | None) -> ToolFormat:
    """The form that a template asks for among those that are read: what demanded calls are written in."""
    if template is None:
        return form
    if form.kind == "mistral" and "[ARGS]" in template:  # the newer models write calls one by one
        return replace(form, listed=False)
    if form.name == "phi4_mini_json" and "functools" in template:
        return replace(form, blocks=form.blocks[::-1])
    return replace(form, single="single tool-call" in template)
