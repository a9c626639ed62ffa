"""The rows of a training file: five kinds, each told by the fields it has. Torch-free.

    chat              {"messages": [...], "tools": [...], "parallel_tool_calls": bool}
    prompt/completion {"prompt": "...", "completion": "..."}, or both as lists of messages
    text              {"text": "..."}
    token ids         {"token_ids": [...], "labels": [...]} ("input_ids" too; labels optional)
    preference        {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
                      (OpenAI's), or {"prompt": ..., "chosen": ..., "rejected": ...} as text or as messages,
                      the prompt left out where chosen and rejected both begin with it (TRL's)

`check_row` turns a parsed JSON value into a row or raises `BadRow` with the field and the reason. Fields that
no kind knows (ids, sources) are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from coserve.errors import InvalidRequest
from coserve.tokenizer import Tokenizer
from coserve.training.chat_rows import (
    BadRow,
    ChatRow,
    Turns,
    bad,
    check_unicode,
    join_chat,
    read_chat,
    read_turns,
)
from coserve.training.dataset import NOT_TRAINED
from coserve.training.methods import METHODS

__all__ = ["BadRow", "ChatRow", "CompletionRow", "Kind", "PreferenceRow", "Row", "TokenRow", "check_row"]


class Kind(StrEnum):
    """What a file's rows are; one file has one kind."""

    CHAT = "chat"
    COMPLETION = "prompt/completion"
    TEXT = "text"
    TOKENS = "token ids"
    PREFERENCE = "preference"


@dataclass(frozen=True)
class CompletionRow:
    """Loss on the completion (and the end token after it), none on the prompt; plain text has no prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenRow:
    """Ids as they are; nothing is added to them."""

    token_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt; loss is on the answers."""

    chosen: ChatRow | CompletionRow
    rejected: ChatRow | CompletionRow


Row = ChatRow | CompletionRow | TokenRow | PreferenceRow

_OPENAI_NAMES = (
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
)
_FIELDS = {
    Kind.CHAT: ("messages",),
    Kind.PREFERENCE: ("chosen", "rejected", *(name for names in _OPENAI_NAMES for name in names)),
    Kind.TEXT: ("text",),
    Kind.TOKENS: ("token_ids", "input_ids"),
    Kind.COMPLETION: ("completion", "prompt"),
}
_SINGLE = (Kind.CHAT, Kind.COMPLETION, Kind.TEXT, Kind.TOKENS)


def kinds_of(method: str) -> tuple[Kind, ...]:
    """The kinds of rows that a method learns from; InvalidRequest for an unknown method."""
    if method not in METHODS:
        raise InvalidRequest(f"method must be one of {', '.join(METHODS)}.", param="method")
    return (Kind.PREFERENCE,) if method == "dpo" else _SINGLE


def kind_of(value: Any) -> Kind:
    """The kind of a parsed JSON value, by its fields. Raises BadRow for none or for more than one."""
    if not isinstance(value, dict):
        bad("", "every line must be a JSON object")
    found = {kind: name for kind, names in _FIELDS.items() for name in names[::-1] if name in value}
    if Kind.PREFERENCE in found and "completion" not in value:
        found.pop(Kind.COMPLETION, None)  # the prompt is the preference's
    if not found:
        bad(
            "messages",
            "missing; a row has messages, or prompt and completion, or text, or token_ids, or prompt, chosen "
            "and rejected",
        )
    if len(found) > 1:
        (one, field), (other, _), *_ = found.items()
        bad(field, f"a row is either of the kind {one} or of the kind {other}, not both")
    return next(iter(found))


def check_row(value: Any, tokenizer: Tokenizer) -> Row:
    """A row of any kind. Raises BadRow."""
    kind = kind_of(value)
    if kind is Kind.CHAT:
        return read_chat(value, tokenizer)
    if kind is Kind.COMPLETION:
        return _completion(value, tokenizer)
    if kind is Kind.TEXT:
        return CompletionRow("", _text(value, "text"))
    if kind is Kind.TOKENS:
        return _tokens(value, tokenizer)
    if "chosen" in value or "rejected" in value:
        return _preference(value, tokenizer)
    return _openai_preference(value, tokenizer)


# ---------------------------------------------------------------- text and ids


def _text(value: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        bad(name, "must be a string" if name in value else "missing")
    if not text and not may_be_empty:
        bad(name, "is empty: there is nothing to train on")
    check_unicode(name, text)
    return text


def _completion(value: Mapping[str, Any], tokenizer: Tokenizer) -> ChatRow | CompletionRow:
    if isinstance(value.get("prompt"), list) and "completion" in value:
        prompt = read_turns(value["prompt"], "prompt", tokenizer, needs_answer=False)
        return join_chat(value, "", prompt, read_turns(value["completion"], "completion", tokenizer))
    return CompletionRow(_text(value, "prompt", may_be_empty=True), _text(value, "completion"))


def _tokens(value: Mapping[str, Any], tokenizer: Tokenizer) -> TokenRow:
    name = "token_ids" if "token_ids" in value else "input_ids"
    if "token_ids" in value and "input_ids" in value:
        bad("input_ids", "is token_ids under another name; give one of the two")
    ids = _integers(value, name)
    limit = tokenizer.id_limit
    if min(ids) < 0 or max(ids) >= limit:
        index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < limit)
        bad(f"{name}[{index}]", f"is {ids[index]}; the vocabulary's ids are 0 to {limit - 1}")
    if value.get("attention_mask") is not None and set(_integers(value, "attention_mask", len(ids))) != {1}:
        bad("attention_mask", "must be 1 everywhere: leave padding out")
    for other in ("completion_mask", "assistant_masks"):
        if value.get(other) is not None:
            bad(other, f"is not supported; say with labels what is trained ({NOT_TRAINED}: not)")
    for other in ("position_ids", "seq_lengths"):
        if value.get(other) is not None:
            bad(other, "is not supported: a row is one example; coserve packs them itself")
    if value.get("labels") is None:
        return TokenRow(ids, ids)
    labels = _integers(value, "labels", len(ids))
    for index, (label, token_id) in enumerate(zip(labels, ids, strict=True)):
        if label not in (NOT_TRAINED, token_id):
            bad(
                f"labels[{index}]", f"is {label}; a label is the token's own id, {token_id}, or {NOT_TRAINED}"
            )
    return TokenRow(ids, labels)


def _integers(value: Mapping[str, Any], name: str, length: int | None = None) -> list[int]:
    found = value[name]
    if not isinstance(found, list) or not found:
        bad(name, "must be a non-empty list of integers")
    if set(map(type, found)) != {int}:
        index = next(i for i, item in enumerate(found) if type(item) is not int)
        bad(f"{name}[{index}]", "must be an integer")
    if length is not None and len(found) != length:
        bad(name, f"has {len(found)} entries for {length} tokens")
    return found


# ---------------------------------------------------------------- preferences


def _openai_preference(value: Mapping[str, Any], tokenizer: Tokenizer) -> PreferenceRow:
    names = next(names for names in _OPENAI_NAMES if names[0] in value or names[1] in value)
    asked = value.get("input")
    if not isinstance(asked, dict):
        bad("input", "must be an object with messages" if "input" in value else "missing")
    prompt = read_turns(asked.get("messages"), "input.messages", tokenizer, needs_answer=False)
    answers = [_answer(value, name, tokenizer) for name in names]
    return _pair(asked, "input.", prompt, answers, names)


def _preference(value: Mapping[str, Any], tokenizer: Tokenizer) -> PreferenceRow:
    names = ("chosen", "rejected")
    for name in names:
        if name not in value:
            bad(name, "missing")
    prompt = value.get("prompt")
    if all(isinstance(value[name], str) for name in names):
        return _text_preference(value)
    answers = [_answer(value, name, tokenizer) for name in names]
    if isinstance(prompt, str):
        bad("prompt", "is text beside messages; make it messages too, or leave it out if both begin with it")
    if prompt is not None:
        turns = read_turns(prompt, "prompt", tokenizer, needs_answer=False)
    else:
        shared = _common(*(answer.messages for answer in answers))
        turns = answers[0].part(0, shared)
        answers = [answer.part(shared) for answer in answers]
    return _pair(value, "", turns, answers, names)


def _answer(value: Mapping[str, Any], name: str, tokenizer: Tokenizer) -> Turns:
    turns = read_turns(value.get(name), name, tokenizer)
    for field, message in zip(turns.fields, value[name], strict=True):
        if message.get("weight") is not None:
            bad(f"{field}.weight", "is not for preference rows: both answers count whole")
    return turns


def _pair(
    value: Mapping[str, Any], prefix: str, prompt: Turns, answers: list[Turns], names: tuple[str, str]
) -> PreferenceRow:
    chosen, rejected = answers
    if chosen.messages == rejected.messages:
        bad(names[1], f"is the same as {names[0]}: there is nothing to prefer")
    for answer, name in zip(answers, names, strict=True):
        if not any(answer.trained):
            bad(name, "has no assistant message after what both begin with")
    return PreferenceRow(join_chat(value, prefix, prompt, chosen), join_chat(value, prefix, prompt, rejected))


def _text_preference(value: Mapping[str, Any]) -> PreferenceRow:
    chosen, rejected = _text(value, "chosen"), _text(value, "rejected")
    if chosen == rejected:
        bad("rejected", "is the same as chosen: there is nothing to prefer")
    if value.get("prompt") is not None:
        prompt = _text(value, "prompt", may_be_empty=True)
    else:
        # A last space goes to the answers: most tokenizers put a space and the word after it together.
        prompt = chosen[: _common(chosen, rejected)].removesuffix(" ")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return PreferenceRow(CompletionRow(prompt, chosen), CompletionRow(prompt, rejected))


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Items that both begin with; at least one is left of each."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)
