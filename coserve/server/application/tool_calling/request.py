"""A request's `tools` and `tool_choice`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.errors import InvalidRequest
from coserve.server.fields import Fields, shown

_NOT_OBJECTS = ("array", "string", "number", "integer", "boolean", "null")


@dataclass(frozen=True)
class Function:
    """One tool. `parameters` is the schema of its arguments; `place` its index in the request."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    place: int


@dataclass(frozen=True)
class ToolUse:
    """What the model may call. `tools` as its template shows them; `functions` those it may call now.

    `forced`: the answer is one call or more; `named`: one of this function. `limited`: not all tools may be
    called.
    """

    tools: list[dict[str, Any]]
    functions: tuple[Function, ...]
    parallel: bool = True
    forced: bool = False
    named: bool = False
    limited: bool = False

    @property
    def constrained(self) -> bool:
        """Whether calls can't be left to the model alone."""
        return self.forced or self.limited or any(function.strict for function in self.functions)


def read_tool_use(fields: Fields) -> ToolUse | None:
    """The tools that an answer may call, or None. Raises InvalidRequest naming the field."""
    tools = fields.array("tools")
    parallel = fields.boolean("parallel_tool_calls", True)
    choice = fields.raw("tool_choice")
    if tools is None:
        if choice not in (None, "none"):
            raise fields.fail("tool_choice", "needs tools.")
        return None
    if not tools:
        raise fields.fail("tools", "must not be empty; leave it out instead.")
    functions = tuple(_read_tool(Fields(tool, f"tools[{place}]."), place) for place, tool in enumerate(tools))
    names = [function.name for function in functions]
    twice = next((place for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise fields.fail(f"tools[{twice}].function.name", f"{shown(names[twice])} stands there twice.")
    if choice is None or choice == "auto":
        return ToolUse(tools, functions, parallel)
    if choice == "none":
        return None
    if choice == "required":
        return ToolUse(tools, functions, parallel, forced=True)
    if isinstance(choice, Mapping):
        return _chosen(Fields(choice, "tool_choice."), ToolUse(tools, functions, parallel))
    raise fields.fail(
        "tool_choice",
        f"must be none, auto, required, a function or allowed_tools; not {shown(choice)}.",
    )


def _read_tool(tool: Fields, place: int) -> Function:
    kind = tool.string("type", "function")
    if kind == "custom":
        raise tool.fail("type", "custom is not supported; use a function with a string parameter.")
    if kind != "function":
        raise tool.fail("type", f"must be function, not {shown(kind)}.")
    function = tool.object("function")
    if function is None:
        raise tool.fail("function", "is required.")
    function.string("description")
    parameters = function.object("parameters")
    if parameters is not None and parameters.raw("type") in _NOT_OBJECTS:
        raise parameters.fail("type", f"must be object, not {shown(parameters.raw('type'))}.")
    return Function(
        function.required_string("name"),
        parameters.body if parameters is not None else {"type": "object", "properties": {}},
        function.boolean("strict"),
        place,
    )


def _chosen(choice: Fields, use: ToolUse) -> ToolUse:
    kind = choice.string("type")
    if kind == "function":
        function = _one_of(choice, use.functions)
        return ToolUse(use.tools, (function,), parallel=False, forced=True, named=True)
    if kind != "allowed_tools":
        raise choice.fail("type", f"must be function or allowed_tools, not {shown(kind)}.")
    allowed = choice.object("allowed_tools")
    if allowed is None:
        raise choice.fail("allowed_tools", "is required.")
    mode = allowed.choice("mode", ("auto", "required"))
    if mode is None:
        raise allowed.fail("mode", "is required: auto or required.")
    entries = allowed.array("tools")
    if not entries:
        raise allowed.fail("tools", "must name one tool or more.")
    found = tuple(
        dict.fromkeys(
            _place_of(Fields(entry, f"{allowed.path}tools[{number}]."), use.functions)
            for number, entry in enumerate(entries)
        )
    )
    functions = tuple(use.functions[place] for place in sorted(found))
    return ToolUse(
        use.tools,
        functions,
        use.parallel,
        forced=mode == "required",
        limited=len(functions) < len(use.functions),
    )


def _place_of(entry: Fields, functions: tuple[Function, ...]) -> int:
    if entry.string("type", "function") != "function":
        raise entry.fail("type", f"must be function, not {shown(entry.raw('type'))}.")
    return _one_of(entry, functions).place


def _one_of(entry: Fields, functions: tuple[Function, ...]) -> Function:
    function = entry.object("function")
    if function is None:
        raise entry.fail("function", "is required.")
    name = function.required_string("name")
    for known in functions:
        if known.name == name:
            return known
    raise InvalidRequest(
        f"{function.path}name {shown(name)} is not among tools.", param=f"{function.path}name"
    )
