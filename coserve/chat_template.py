"""Chat templates: a model's own Jinja2 program that turns messages into the text it was trained on.

Rendered in Jinja2's immutable sandbox with the names Hugging Face templates expect: `raise_exception`,
`strftime_now`, a `tojson` that escapes neither HTML nor non-ASCII, loop controls, the special tokens, and
`{% generation %}` blocks (which only mark text and render as their body).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from coserve.errors import ConfigError, InvalidRequest
from coserve.tool_prompt import with_tools

Message = Mapping[str, Any]

_CONTINUE_MARK = "\ue000continue-here\ue000"
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRefusal(jinja2.TemplateError):
    """What a template's own `raise_exception(...)` raises."""


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled chat template with the special tokens it may print.

    Raises ConfigError when `source` is not valid Jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja2 (line {error.lineno}: {error.message})",
                param="chat_template",
            ) from error
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        With `continue_final_message` the text ends inside the last message, right after its content.
        Raises InvalidRequest (param `messages`) when the template refuses the conversation or fails on it,
        and (param `chat_template_kwargs`) for a variable with a reserved name.
        """
        reserved = sorted(_RESERVED & variables.keys())
        if reserved:
            raise InvalidRequest(
                f"{reserved[0]!r} cannot be set through chat_template_kwargs", param="chat_template_kwargs"
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set one of them",
                param="continue_final_message",
            )
        plain = with_tools([plain_message(message) for message in messages], tools, self.source)
        if continue_final_message:
            _mark_final_message(plain)
        context = {
            **self._special_tokens,
            **variables,
            "messages": plain,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(context)
        except (_TemplateRefusal, jinja2.exceptions.SecurityError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except Exception as error:  # a template is a program: any error of it is the input's, never a crash
            raise InvalidRequest(
                f"the model's chat template cannot render these messages ({type(error).__name__}: {error})",
                param="messages",
            ) from error
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_CONTINUE_MARK)
        if not mark:
            raise InvalidRequest(
                "the model's chat template does not print the last message's content; it can't be continued",
                param="continue_final_message",
            )
        return before


def _mark_final_message(messages: list[dict[str, Any]]) -> None:
    if not messages or not messages[-1].get("content"):
        raise InvalidRequest(
            "continue_final_message needs a last message with content", param="continue_final_message"
        )
    messages[-1]["content"] = messages[-1]["content"] + _CONTINUE_MARK


def plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content a string, no null fields, tool arguments as objects.

    Text parts are joined by line breaks (as vLLM does). Raises InvalidRequest (param `messages`) for a part
    that isn't text.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, (list, tuple)):
        plain["content"] = "\n".join(_part_text(part) for part in content)
    elif content is None:
        plain["content"] = ""
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
    raise InvalidRequest("content parts must be of type 'text' with a string 'text'", param="messages")


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(call)
    function = plain.get("function")
    if isinstance(function, Mapping):
        function = dict(function)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    "tool_calls[].function.arguments must be a JSON object in a string", param="messages"
                ) from error
        plain["function"] = function
    return plain


def find_template(directory: Path, tokenizer_config: Mapping[str, Any], override: str | None) -> str | None:
    """The template's source: the `override` file, else chat_template.jinja, else tokenizer_config.json.

    A list of named templates gives the one called "default". None when the model has no template.
    """
    if override:
        try:
            return Path(override).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--chat-template {override!r} cannot be read; give the path of a Jinja2 file in UTF-8",
                param="chat_template",
            ) from error
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        return named.get("default") or next(iter(named.values()), None)
    return source
