"""Tool calls: a random set of tools, requests that need one of them, and answers from tool results."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from examples.demo_model.core import ask, is_held_out
from examples.demo_model.lexicon import pseudo_word
from examples.demo_model.tool_kinds import KINDS, Kind, Values, invented_kind

Message = dict[str, object]


@dataclass(frozen=True)
class Tool:
    """A concrete tool: one name, description and parameter naming drawn from a :class:`Kind`."""

    kind: Kind
    schema: dict[str, object]
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.schema["function"]["name"])  # type: ignore[index]


_ENDINGS = ("v2", "tool", "api", "now")
_OPTIONAL = (
    ("unit", ("celsius", "fahrenheit")),
    ("format", ("short", "long")),
    ("lang", ("en", "de")),
    ("mode", ("fast", "slow")),
)


def make_tool(rng: random.Random, kind: Kind) -> Tool:
    """Draw a concrete tool schema (OpenAI function format) of ``kind``; optional parameters stay unused."""
    names = tuple(rng.choice(options) for options in kind.parameters)
    described = rng.choice((None, None, "The {n}.", "The {n} to use.", "{n}", "The {n}, for example {v}."))
    properties: dict[str, object] = {}
    for name, sample in zip(names, kind.values(rng), strict=True):
        numeric = isinstance(sample, int)
        properties[name] = {"type": rng.choice(("integer", "integer", "number")) if numeric else "string"}
        if described:
            properties[name] |= {"description": described.format(n=name, v=sample)}  # type: ignore[operator]
    if rng.random() < 0.15:
        name, choices = rng.choice(_OPTIONAL)
        properties.setdefault(name, {"type": "string", "enum": list(choices)})
    name = rng.choice(kind.names)
    if rng.random() < 0.1:
        name = f"{pseudo_word(rng)}_{name}" if rng.random() < 0.5 else f"{name}_{rng.choice(_ENDINGS)}"
    parameters: dict[str, object] = {"type": "object", "properties": properties}
    if rng.random() < 0.9:
        parameters["required"] = list(names)
    function = {"name": name, "description": rng.choice(kind.descriptions), "parameters": parameters}
    return Tool(kind, {"type": "function", "function": function}, names)


def make_tools(rng: random.Random, low: int = 1, high: int = 3) -> list[Tool]:
    """Draw ``low`` to ``high`` tools of different kinds with different names."""
    tools: dict[str, Tool] = {}
    for kind in rng.sample(KINDS, rng.randint(low, high)):
        tool = make_tool(rng, invented_kind(rng) if rng.random() < 0.25 else kind)
        tools.setdefault(tool.name, tool)
    return list(tools.values())


@dataclass(frozen=True)
class ToolUse:
    """A request, the right call, a tool result and the right final answer."""

    user: str
    call: dict[str, object]
    response: str
    answer: str


def _split_key(kind: Kind, values: Values) -> str:
    """Split key of argument values; arithmetic shares the key of the plain questions."""
    name = kind.names[0]
    if name == "calculator":
        left, sign, right = str(values[0]).split()
        pair = (int(left), int(right))
        name = {"+": "add", "-": "subtract", "*": "multiply"}[sign]
    elif name == "add":
        pair = (int(values[0]), int(values[1]))
    if name == "add":
        return f"sums:{min(pair)}:{max(pair)}"
    if name == "subtract":
        return f"differences:{pair[0]}:{pair[1]}"
    return f"tool:{name}:{values}"


def use_tool(rng: random.Random, tool: Tool, held_out: bool) -> ToolUse:
    """A request for ``tool`` whose argument values belong to the wanted split."""
    while True:
        values = tool.kind.values(rng)
        if is_held_out(_split_key(tool.kind, values)) == held_out or (held_out and tool.kind.few):
            break
    user = ask(
        rng,
        tuple(
            t.replace("{0}", "{v[0]}").replace("{1}", "{v[1]}").replace("{2}", "{v[2]}")
            for t in tool.kind.requests
        ),
        v=values,
    )[1]
    arguments = dict(zip(tool.parameters, values, strict=True))
    result, answer = tool.kind.result(rng, values)
    roll = rng.random()
    if roll < 0.08:
        response = answer
    elif roll < 0.2 and len(result) == 1:
        response = str(next(iter(result.values())))
    else:
        response = json.dumps(result)
    return ToolUse(user, {"name": tool.name, "arguments": arguments}, response, answer)
