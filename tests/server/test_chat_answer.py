"""An answer's pieces: the same whole however it was cut into deltas, every token passed on once."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from coserve.engine.messages import TokenLogprobs
from coserve.server.application.answer_pieces import CallArguments, CallOpened, Content, Reasoning
from coserve.server.application.chat_answer import Answer, AnswerForm, AnswerSplitter
from coserve.server.application.generation import Delta
from coserve.server.application.reasoning import ReasoningFormat
from coserve.server.application.tool_calling.formats import FORMATS, HERMES

SCHEMAS = {"f": {"properties": {"x": {"type": "string"}}}}
THINK = ReasoningFormat()
PARTS = [
    "a", "\n", " ", "<", "<think>", "</think>", "<tool_call>", "</tool_call>",
    '{"name": "f", "arguments": {"x": "', 'y"}}', "<function=f>", "<parameter=x>",
    "</parameter>", "</function>", "}", '"',
]  # fmt: skip
FORMS = [
    AnswerForm(),
    AnswerForm(tools=HERMES, schemas=SCHEMAS),
    AnswerForm(tools=HERMES, schemas=SCHEMAS, parallel_tool_calls=False, named=True),
    AnswerForm(reasoning=THINK),
    AnswerForm(tools=FORMATS["qwen3_coder"], schemas=SCHEMAS, reasoning=THINK, inside=True),
    AnswerForm(tools=FORMATS["llama3_json"], schemas=SCHEMAS, reasoning=THINK, include_reasoning=False),
]


def deltas(pieces: list[str], held: list[int], reason: str) -> list[Delta]:
    """One delta a piece, each of one token; `held` characters of a piece come with the next, as where they
    may begin a stop string."""
    made, waiting = [], ""
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        text = waiting + piece
        keep = 0 if last else min(held[number], len(text))
        waiting = text[len(text) - keep :]
        entry = TokenLogprobs(number, -0.5, 1, [])
        made.append(
            Delta(
                index=0,
                text=text[: len(text) - keep],
                token_ids=[number],
                logprobs=[entry],
                held=keep,
                finish_reason=reason if last else None,
            )
        )
    return made


def read(form: AnswerForm, made: list[Delta]) -> tuple[Answer, int]:
    splitter, answer = AnswerSplitter(form), Answer(0)
    opened: list[int] = []
    for delta in made:
        part = splitter.split(delta)
        for before, piece in zip([None, *part.pieces], part.pieces, strict=False):
            if isinstance(piece, CallOpened):
                assert piece.index == len(opened)
                opened.append(piece.index)
            elif isinstance(piece, CallArguments):
                assert piece.index == opened[-1] and piece.text
            else:
                assert isinstance(piece, Content | Reasoning) and piece.text
                assert type(before) is not type(piece)  # neighbours of a kind are one
        assert [entry.token_id for entry in part.logprobs] == list(part.token_ids)
        answer.add(part)
    return answer, splitter.reasoning_tokens


def told(answer: Answer) -> tuple[object, ...]:
    calls = [(call.name, call.arguments) for call in answer.calls]
    return answer.content, answer.reasoning, calls, answer.finish_reason


@given(
    form=st.sampled_from(FORMS),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=10),
    reason=st.sampled_from(["stop", "length"]),
    data=st.data(),
)
def test_an_answer_does_not_depend_on_its_deltas(
    form: AnswerForm, parts: list[str], reason: str, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    held = data.draw(st.lists(st.integers(0, 4), min_size=len(pieces), max_size=len(pieces)))
    whole, _ = read(form, deltas([text], [0], reason))
    answer, reasoning = read(form, deltas(pieces, held, reason))
    assert told(answer) == told(whole)
    assert answer.token_ids == list(range(len(pieces))) and 0 <= reasoning <= len(pieces)
    assert (answer.finish_reason == "length") == (reason == "length")
    if form.include_reasoning and form.reasoning is None and not answer.calls:
        assert answer.content == text
    if form.named or reason == "length":
        assert answer.finish_reason == reason


def test_a_call_that_a_stop_string_cut_is_none_to_be_made() -> None:
    form = FORMS[1]
    cut, _ = read(form, deltas(['<tool_call>{"name": "f", "arguments": {"x": "y'], [0], "stop"))
    assert cut.finish_reason == "stop" and cut.calls[0].arguments == '{"x": "y'
    whole, _ = read(
        form, deltas(['<tool_call>{"name": "f", "arguments": {"x": "y"}}</tool_call>'], [0], "stop")
    )
    assert whole.finish_reason == "tool_calls" and json.loads(whole.calls[0].arguments) == {"x": "y"}
