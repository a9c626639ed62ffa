"""A chat request's conversation: checked, rendered by the model's template, and what its answer may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from coserve.server.application import reasoning
from coserve.server.application.chat_answer import AnswerForm
from coserve.server.application.chat_messages import read_messages
from coserve.server.application.chat_settings import ChatSettings
from coserve.server.application.sampling import SamplingRequest
from coserve.server.application.tool_calling import grammar
from coserve.server.application.tool_calling.formats import JSON_LIST, ToolFormat
from coserve.server.application.tool_calling.request import ToolUse, read_tool_use
from coserve.server.fields import Fields
from coserve.tokenizer import Tokenizer

_RESERVED = frozenset(
    {"self", "messages", "tools", "template", "add_generation_prompt", "continue_final_message"}
)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Conversation:
    """Token ids of a conversation, and what its answer may hold.

    `role` gives the answer; `continued` is the text of the message that it goes on with.
    """

    token_ids: list[int]
    form: AnswerForm
    role: str
    continued: str
    _tools: ToolUse | None
    _tokenizer: Tokenizer

    def sampling(self, request: SamplingRequest) -> SamplingRequest:
        """The request with the grammar that the answer has to match, made of the one asked for its text.

        Calls go by their functions' schemas where they are demanded or strict; a model free to call may do
        so in place of that text. Reasoning comes before, freely. Special tokens that mark something are
        shown for the answer's reader. Raises InvalidRequest naming a tool.
        """
        token_id, form = self._tokenizer.added_token_id, self.form
        made = self._with_calls(request.sampling.grammar)
        if made and form.reasoning is not None:
            made = grammar.with_reasoning(made, form.reasoning, form.inside, token_id)
        ids = map(token_id, form.marks)
        return replace(
            request,
            sampling=msgspec.structs.replace(request.sampling, grammar=made),
            shown_token_ids=frozenset(found for found in ids if found is not None),
        )

    def _with_calls(self, body: str) -> str:
        use, form = self._tools, self.form.tools
        if use is None or form is None or form.kind == "python" or not (use.constrained or body):
            return body
        calls = grammar.calls_grammar(
            form,
            use.functions,
            self._tokenizer.added_token_id,
            parallel=self.form.parallel_tool_calls,
            text=not use.forced and not body,
        )
        return grammar.either(calls, body) if body and not use.forced else calls


def read_conversation(fields: Fields, chat: ChatSettings) -> Conversation:
    """Check, render and tokenise a request's conversation."""
    messages = read_messages(fields)
    use = read_tool_use(fields)
    tool_format = _tool_format(fields, use, chat)
    add_prompt = fields.boolean("add_generation_prompt", True)
    continues = fields.boolean("continue_final_message")
    if continues and fields.has("add_generation_prompt") and add_prompt:
        raise fields.fail("continue_final_message", "can't be combined with add_generation_prompt.")
    template = _template(fields, chat)
    if use is not None and _knows(template, "tool_calls") and not _knows(template, "tools"):
        raise fields.fail("tools", "aren't read by this model's template; give another by --chat-template.")
    text = chat.tokenizer.render_chat(
        messages,
        use.tools if use is not None else None,
        add_generation_prompt=add_prompt and not continues,
        continue_final_message=continues,
        template=fields.string("chat_template"),
        **_variables(fields, template),
    )
    continued = _text_of(messages[-1]) if continues else ""
    form = AnswerForm(
        tools=tool_format,
        schemas={function.name: function.parameters for function in use.functions} if use is not None else {},
        parallel_tool_calls=use is None or (use.parallel and not (tool_format and tool_format.single)),
        named=use is not None and use.named,
        include_reasoning=fields.boolean("include_reasoning", True),
    )
    if chat.reasoning is not None:
        inside = reasoning.begins_inside(chat.reasoning, text, continued)
        if inside is not None:
            form = replace(form, reasoning=chat.reasoning, inside=inside)
    return Conversation(
        token_ids=chat.tokenizer.encode(text, add_special_tokens=fields.boolean("add_special_tokens", False)),
        form=form,
        role=chat.response_role if add_prompt and not continues else messages[-1]["role"],
        continued=continued,
        _tools=use,
        _tokenizer=chat.tokenizer,
    )


def _tool_format(fields: Fields, use: ToolUse | None, chat: ChatSettings) -> ToolFormat | None:
    if use is None:
        return None
    if use.forced:
        if chat.tools is None:
            raise fields.fail(
                "tool_choice",
                "can't be kept: no call format is known; start the server with --tool-call-parser.",
            )
        return JSON_LIST if chat.tools.kind == "python" else chat.tools
    if not chat.auto_tools:
        raise fields.fail("tool_choice", "auto needs a server started with --enable-auto-tool-choice.")
    return chat.tools


def _variables(fields: Fields, template: str | None) -> dict[str, Any]:
    """The template's own variables: chat_template_kwargs, documents, the effort of reasoning."""
    kwargs = fields.object("chat_template_kwargs")
    variables = dict(kwargs.body) if kwargs is not None else {}
    reserved = sorted(variables.keys() & _RESERVED)
    if reserved:
        raise fields.fail(f"chat_template_kwargs.{reserved[0]}", "is set by the request's own fields.")
    effort = fields.choice("reasoning_effort", _EFFORTS)
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
        if effort == "none":
            variables.setdefault("enable_thinking", False)
    documents = fields.array("documents")
    if documents is not None:
        if not _knows(template, "documents"):
            raise fields.fail("documents", "aren't read by this model's template; put them into messages.")
        for index, document in enumerate(documents):
            if not isinstance(document, Mapping):
                raise fields.fail(f"documents[{index}]", "must be an object.")
        variables["documents"] = documents
    return variables


def _template(fields: Fields, chat: ChatSettings) -> str | None:
    """The source of the template that the messages are rendered by."""
    source = fields.string("chat_template")
    if source is None:
        return chat.tokenizer.chat_template
    if not chat.request_templates:
        raise fields.fail(
            "chat_template",
            "is taken from requests only by a server started with --trust-request-chat-template.",
        )
    return source


def _knows(template: str | None, variable: str) -> bool:
    return template is not None and variable in template


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
