"""Training rows to text, tokens and labels, conversations by the model's own chat template.

What is trained of a conversation: the content of each assistant turn whose weight isn't 0, with the token
that ends the turn, without the turn's header. Where a turn lies in the text follows from rendering prefixes:
with M the messages, the turn i begins where render(M[:i], add_generation_prompt) ends, which is also what
the model sees when it answers. The text is tokenised once, as a whole, so the ids are those that the chat
route makes of the same messages; a token is trained when it covers any character of a trained turn.

Text outside conversations is tokenised as /v1/completions does (with bos where the model's tokenizer adds
one, never two) and gets one end token unless it ends in one.
"""

from __future__ import annotations

from dataclasses import dataclass

from coserve.errors import CoserveError, InvalidRequest
from coserve.tokenizer import Tokenizer
from coserve.training.dataset import NOT_TRAINED
from coserve.training.rows import BadRow, ChatRow, CompletionRow, PreferenceRow, Row, TokenRow


@dataclass(frozen=True)
class Example:
    """What the model sees: its text (none where a row gave ids), token ids [T], and labels [T] (-100 where
    not trained)."""

    text: str
    token_ids: list[int]
    labels: list[int]


def encode_row(row: Row, tokenizer: Tokenizer) -> tuple[Example, ...]:
    """A valid row's example; of a preference row two, chosen and rejected.

    Raises BadRow when the chat template can't place its turns, or a text is too long to be read.
    """
    if isinstance(row, TokenRow):
        return (Example("", row.token_ids, row.labels),)
    if isinstance(row, PreferenceRow):
        return *encode_row(row.chosen, tokenizer), *encode_row(row.rejected, tokenizer)
    try:
        if isinstance(row, CompletionRow):
            return (_encode_completion(row, tokenizer),)
        text, spans = _trained_spans(row, tokenizer)
        return (_label(text, spans, tokenizer),)
    except CoserveError as error:
        field = "" if isinstance(row, CompletionRow) else _field_of(row, error.param)
        raise BadRow(field, error.message) from error


def _field_of(row: ChatRow, param: str | None) -> str:
    """Where an error of the chat template lies: at one message, or at all of them."""
    return param if param in row.fields else row.fields[0].partition("[")[0]


def _encode_completion(row: CompletionRow, tokenizer: Tokenizer) -> Example:
    text = row.prompt + row.completion
    body = _label(text, [(len(row.prompt), len(text))], tokenizer)
    bos = tokenizer.encode("")
    bos = bos if bos == [tokenizer.bos_id] and body.token_ids[:1] != bos else []
    ended = not set(body.token_ids[-1:]).isdisjoint(tokenizer.eos_token_ids)
    eos = [] if ended or tokenizer.eos_id is None else [tokenizer.eos_id]
    shown = (
        (tokenizer.token_text(bos[0]) if bos else "") + text + (tokenizer.token_text(eos[0]) if eos else "")
    )
    return Example(shown, bos + body.token_ids + eos, [NOT_TRAINED] * len(bos) + body.labels + eos)


def _label(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Example:
    """Tokenise `text` and label the tokens that overlap one of the ascending character `spans`."""
    encoded = tokenizer.encode_with_offsets(text)
    labels = [NOT_TRAINED] * len(encoded.token_ids)
    remaining = iter(spans)
    begin, end = next(remaining, (len(text), len(text)))
    for position, (token_begin, token_end) in enumerate(encoded.offsets):
        while token_begin >= end < len(text):
            begin, end = next(remaining, (len(text), len(text)))
        overlaps = token_begin < token_end and token_begin < end and token_end > begin
        # A header's special token may have swallowed the white space a turn begins with; it stays header.
        if overlaps and (token_begin >= begin or encoded.token_ids[position] not in tokenizer.special_ids):
            labels[position] = encoded.token_ids[position]
    return Example(text, encoded.token_ids, labels)


# ---------------------------------------------------------------- where the assistant's turns lie


def _trained_spans(row: ChatRow, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    text = tokenizer.render_chat(row.messages, row.tools, add_generation_prompt=False)
    starts = [
        _turn_start(row, index, text, tokenizer) if message["role"] == "assistant" else None
        for index, message in enumerate(row.messages)
    ]
    spans = []
    for index, start in enumerate(starts):
        if start is not None and row.trained[index]:
            following = [later for later in starts[index + 1 :] if later is not None]
            limit = following[0] if following else len(text)
            spans.append((start, _turn_end(row, index, start, limit, text, tokenizer)))
    return text, spans


def _turn_start(row: ChatRow, index: int, text: str, tokenizer: Tokenizer) -> int:
    if index == 0:
        prompt = _header_of_first_turn(row, tokenizer)
    else:
        prompt = tokenizer.render_chat(row.messages[:index], row.tools, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _no_prefix(row, index)
    return len(prompt)


def _header_of_first_turn(row: ChatRow, tokenizer: Tokenizer) -> str:
    """The text before a conversation's first message where that is the assistant's own: what two different
    answers have in common."""
    texts = [
        tokenizer.render_chat(
            [{"role": "assistant", "content": word}], row.tools, add_generation_prompt=False
        )
        for word in ("a", "b")
    ]
    differing = (i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
    return texts[0][: next(differing, None)]


def _turn_end(row: ChatRow, index: int, start: int, limit: int, text: str, tokenizer: Tokenizer) -> int:
    """The character after the turn's end token (or after its text, where the template writes none)."""
    alone = tokenizer.render_chat(row.messages[: index + 1], row.tools, add_generation_prompt=False)
    for end in _end_candidates(alone, start, tokenizer):
        if end <= limit and text.startswith(alone[:end]):
            return end
    # Some templates write earlier turns differently (Qwen3 leaves out their reasoning); as no message holds
    # special tokens, the first end token after the turn's start is the turn's own.
    found = [(text.find(token, start, limit), token) for token in tokenizer.eos_texts]
    ends = [at + len(token) for at, token in found if at >= 0]
    if not ends:
        raise _no_prefix(row, index)
    return min(ends)


def _end_candidates(alone: str, start: int, tokenizer: Tokenizer) -> list[int]:
    """Where the last turn of `alone` may end, best guess first.

    The text ends in a run of special tokens and white space. The turn ends with the run's first token that
    ends generation; failing that with its last, then with earlier ones; with no run, at the end of the text.
    """
    special = {*tokenizer.special_texts, *tokenizer.eos_texts}
    run: list[tuple[int, str]] = []
    rest = alone[start:].rstrip()
    while token := max((text for text in special if rest.endswith(text)), key=len, default=""):
        run.append((start + len(rest), token))
        rest = rest.removesuffix(token).rstrip()
    if not run:
        return [len(alone)]
    ending = [at for at, token in reversed(run) if token in tokenizer.eos_texts]
    return [*ending, *(at for at, token in run if token not in tokenizer.eos_texts)]


def _no_prefix(row: ChatRow, index: int) -> InvalidRequest:
    return InvalidRequest(
        "the chat template renders this turn differently once later messages follow, so what to train on "
        "can't be told; split the conversation into one row a turn, or give the server another template",
        param=row.fields[index],
    )
