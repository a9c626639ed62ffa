"""What is trained of a row, and what is said of a bad one."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.errors import DatasetError, InvalidRequest
from coserve.training.chat_data import MAX_LISTED_ERRORS, preview_row, read_chat_examples
from coserve.training.chat_rows import ROLES
from coserve.training.dataset import TokenDataset
from tests import tokenizers as made

TOKENIZER = made.byte_level()
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def lines(*rows):
    return [(row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows]


def chat(*messages, **fields):
    return {"messages": list(messages), **fields}


def trained_text(example, tokenizer=TOKENIZER):
    """The trained runs of tokens, as text."""
    runs, run = [], []
    for token_id, label in [*zip(example.token_ids, example.labels, strict=True), (0, -100)]:
        assert label in (token_id, -100)
        if label == -100 and run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False, continues_text=True))
            run = []
        elif label != -100:
            run.append(token_id)
    return runs


def errors_of(*rows, tokenizer=TOKENIZER):
    with pytest.raises(DatasetError) as caught:
        list(read_chat_examples(lines(*rows), tokenizer, 0))
    assert caught.value.param == "training_file"
    return [(error.line, error.field, error.reason) for error in caught.value.lines]


# ---------------------------------------------------------------- what is trained


def test_assistant_turns_are_trained_with_their_end_and_without_their_header():
    system = {"role": "system", "content": "be kind"}
    example = preview_row(
        chat(system, USER, ANSWER, USER, {"role": "assistant", "content": "bye"}), TOKENIZER
    )
    assert trained_text(example) == ["hello<|end|>", "bye<|end|>"]
    assert example.token_ids == TOKENIZER.encode_chat(
        [system, USER, ANSWER, USER, {"role": "assistant", "content": "bye"}], add_generation_prompt=False
    )
    assert example.token_ids.count(TOKENIZER.eos_id) == 5


def test_the_tokens_before_a_turn_are_what_the_model_sees_when_it_answers():
    example = preview_row(chat(USER, ANSWER), TOKENIZER)
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert example.token_ids[:first] == TOKENIZER.encode_chat([USER])


def test_weights_choose_the_turns():
    muted = {**ANSWER, "weight": 0}
    assert trained_text(preview_row(chat(USER, muted, USER, {**ANSWER, "weight": 1}), TOKENIZER)) == [
        "hello<|end|>"
    ]
    assert trained_text(preview_row(chat(USER, muted), TOKENIZER)) == []


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(st.sampled_from(ROLES), TEXT, st.booleans()), min_size=1, max_size=5), TEXT)
@settings(max_examples=120)
def test_any_conversation_trains_exactly_its_answers(turns, last):
    messages = []
    for role, content, loud in [*turns, ("assistant", last, True)]:
        message = {"role": role, "content": content}
        if role == "assistant":
            message["weight"] = int(loud)
        messages.append(message)
    if any(TOKENIZER.special_text_in(message["content"]) for message in messages):
        return
    example = preview_row(chat(*messages), TOKENIZER)
    wanted = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant" and m["weight"]]
    got = trained_text(example)
    assert len(got) == len(wanted)
    for text, answer in zip(got, wanted, strict=True):
        # a header's line break may be merged with those the answer begins with
        assert text.lstrip("\n") == answer.lstrip("\n")


def test_a_conversation_may_begin_with_the_assistant():
    example = preview_row(chat(ANSWER, USER, ANSWER), TOKENIZER)
    assert trained_text(example) == ["hello<|end|>", "hello<|end|>"]


def test_parts_and_tool_calls():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = made.byte_level(template)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}
    row = chat(
        {"role": "user", "content": [{"type": "text", "text": "what"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
        {"role": "assistant", "content": "it is 42"},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert trained_text(preview_row(row, tokenizer)) == ['[f {"x": "ü"}]<|end|>', "it is 42<|end|>"]


def test_completions_train_the_completion_and_one_end_token():
    example = preview_row({"prompt": "hello", "completion": " world"}, TOKENIZER)
    assert trained_text(example) == [" world<|end|>"]
    ended = preview_row({"prompt": "hello", "completion": " world<|end|>"}, TOKENIZER)
    assert ended.token_ids == example.token_ids and ended.text == example.text
    with_bos = preview_row({"prompt": "", "completion": "hello"}, made.byte_level(add_bos=True))
    assert with_bos.text == "<|bos|>hello<|end|>" and with_bos.labels[0] == -100
    assert trained_text(with_bos) == ["hello<|end|>"]


def test_a_template_without_end_tokens_trains_the_whole_turn():
    tokenizer = made.byte_level(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert trained_text(preview_row(chat(USER, ANSWER, USER), tokenizer)) == ["hello\n"]


def test_templates_that_write_earlier_turns_differently():
    """Qwen3 drops the reasoning of earlier turns, Phi-3 ends the whole text with another token."""
    thinking = made.byte_level(
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    row = chat(USER, ANSWER, USER, {"role": "assistant", "content": "bye"})
    assert trained_text(preview_row(row, thinking)) == ["hello<|end|>", "<think>\n\n</think>\n\nbye<|end|>"]
    closing = made.byte_level(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|bos|>{% endif %}"
    )
    assert trained_text(preview_row(row, closing)) == ["hello<|end|>", "bye<|end|>"]


def test_a_template_without_the_prefix_property_is_an_error():
    counting = made.byte_level(
        "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (error,) = errors_of(chat(USER, ANSWER, USER, ANSWER), tokenizer=counting)
    assert error[:2] == (1, "messages[1]") and "renders this turn differently" in error[2]


def test_a_template_that_refuses_is_an_error_of_the_line():
    strict = made.byte_level("{{ raise_exception('no system turns') }}")
    (error,) = errors_of(chat(USER, ANSWER), tokenizer=strict)
    assert error[:2] == (1, "messages") and "no system turns" in error[2]


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3-mini"])
def test_published_templates(name):
    tokenizer = made.shared(name) or TOKENIZER
    end = "<|end|>" if tokenizer is TOKENIZER or name != "qwen2.5" else "<|im_end|>"
    row = chat(USER, ANSWER, USER, {"role": "assistant", "content": "bye 你👩"})
    example = preview_row(row, tokenizer)
    got = [text.strip() for text in trained_text(example, tokenizer)]
    assert got[0] == "hello" + end and got[1].startswith("bye 你👩" + (end if tokenizer is TOKENIZER else ""))
    assert example.token_ids == tokenizer.encode_chat(row["messages"], add_generation_prompt=False)


# ---------------------------------------------------------------- files


def test_counts_and_the_data_set(tmp_path):
    long = chat(USER, {"role": "assistant", "content": "hello" * 40})
    late = chat({"role": "user", "content": "hello" * 40}, ANSWER)
    silent = chat(USER, {**ANSWER, "weight": 0})
    data = read_chat_examples(lines(chat(USER, ANSWER), long, late, silent), TOKENIZER, 24)
    assert TokenDataset.write(tmp_path / "data", data) == 2
    assert (data.examples, data.truncated, data.dropped) == (2, 1, 2)
    dataset = TokenDataset.open(tmp_path / "data")
    assert data.tokens == dataset.lengths.sum() and dataset.lengths.max() == 24
    assert data.trained_tokens == sum(dataset.trained_tokens(i) for i in range(2))


def test_nothing_left_to_train_is_an_error():
    silent = chat(USER, {**ANSWER, "weight": 0})
    with pytest.raises(InvalidRequest, match="none of the 2 rows has a trained token"):
        list(read_chat_examples(lines(silent, silent), TOKENIZER, 0))
    for empty in ([], [b"\n", b"  \r\n"], [b"\xef\xbb\xbf"]):
        with pytest.raises(InvalidRequest, match="holds no rows"):
            list(read_chat_examples(empty, TOKENIZER, 0))


def test_bom_crlf_and_blank_lines_at_the_end_are_tolerated():
    good = json.dumps(chat(USER, ANSWER)).encode()
    data = read_chat_examples([b"\xef\xbb\xbf" + good + b"\r\n", good, b"\r\n", b"\n"], TOKENIZER, 0)
    assert len(list(data)) == 2


def test_blank_lines_in_the_middle_are_errors():
    assert errors_of(chat(USER, ANSWER), b"", chat(USER, ANSWER)) == [(2, "", "is empty")]


def test_all_bad_lines_are_reported_with_line_and_field():
    found = errors_of(
        b"{x}", chat(USER, ANSWER), b"\xff\xfe{", [1], chat({"role": "bot", "content": ""}), b"[" * 9999
    )
    assert [(line, field) for line, field, _ in found] == [
        (1, ""),
        (3, ""),
        (4, ""),
        (5, "messages[0].role"),
        (6, ""),
    ]
    assert "not valid JSON" in found[0][2] and "not UTF-8" in found[1][2] and "JSON object" in found[2][2]
    assert "system, user, assistant, tool" in found[3][2]


def test_many_bad_lines_are_counted_and_the_first_listed():
    with pytest.raises(DatasetError, match=r"70 bad lines: line 1: .* \(and 20 more\)") as caught:
        list(read_chat_examples([b"nope\n"] * 70, TOKENIZER, 0))
    assert caught.value.total == 70 and len(caught.value.lines) == MAX_LISTED_ERRORS


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_ROWS = [
    ({}, "messages", "missing"),
    ({"messages": [], "prompt": "x"}, "messages", "not both"),
    (chat(), "messages", "non-empty"),
    ({"messages": {}}, "messages", "non-empty"),
    (chat(USER), "messages", "at least one assistant"),
    (chat("hi", ANSWER), "messages[0]", "must be an object"),
    (chat(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight", "integer 0 or 1"),
    (chat(USER, {**ANSWER, "weight": True}), "messages[1].weight", "integer 0 or 1"),
    (chat({**USER, "weight": 1}, ANSWER), "messages[0].weight", "only assistant"),
    (chat(USER, {"role": "assistant"}), "messages[1].content", "beside tool_calls"),
    (chat({"role": "user", "content": None}, ANSWER), "messages[0].content", "must be a string"),
    (chat({"role": "user", "content": 3}, ANSWER), "messages[0].content", "must be a string"),
    (
        chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        "messages[0].content[0]",
        "text part",
    ),
    (chat({"role": "user", "content": "a\ud800"}, ANSWER), "messages[0].content", "lone surrogate"),
    (chat({"role": "user", "content": "a<|end|>"}, ANSWER), "messages[0].content", "special token <|end|>"),
    (chat({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "only assistant"),
    (chat({**ANSWER, "tool_calls": {"a": 1}}), "messages[0].tool_calls", "must be a list"),
    (chat({**ANSWER, "tool_calls": [{"function": {}}]}), "messages[0].tool_calls[0].function", "a name"),
    (
        chat({**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        "messages[0].tool_calls[0].function.arguments",
        "JSON in a string",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}),
        "messages[0].tool_calls[0].function.arguments",
        "JSON object",
    ),
    (chat({**ANSWER, "function_call": {}}), "messages[0].function_call", "use tool_calls"),
    (chat(USER, ANSWER, functions=[]), "functions", "use tools"),
    (chat(USER, ANSWER, tools="f"), "tools", "must be a list"),
    (chat(USER, ANSWER, tools=[{"name": "f"}]), "tools[0]", "must be"),
    ({"prompt": "x"}, "completion", "missing"),
    ({"prompt": 1, "completion": "x"}, "prompt", "must be a string"),
    ({"prompt": "x", "completion": ""}, "completion", "nothing to train"),
    ({"prompt": "\udfff", "completion": "y"}, "prompt", "lone surrogate"),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD_ROWS, ids=[f"{f}-{r}" for _, f, r in BAD_ROWS])
def test_bad_rows_are_named(row, field, reason):
    (error,) = errors_of(row)
    assert error[:2] == (1, field) and reason in error[2]
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as caught:
        preview_row(row, TOKENIZER)
    assert caught.value.param == field


def test_previews_are_cut_where_training_is():
    example = preview_row(chat(USER, ANSWER), TOKENIZER, max_length=5)
    assert len(example.token_ids) == len(example.labels) == 5


def test_a_shared_chat_file():
    file = made.SHARED / "chat" / "openai-toy-chat" / "toy_chat_fine_tuning.jsonl"
    content = file.read_bytes() if file.is_file() else b"".join(lines(*[chat(USER, ANSWER)] * 5))
    data = read_chat_examples(content.splitlines(keepends=True), TOKENIZER, 2048)
    assert len(list(data)) == data.examples == 5 and 0 < data.trained_tokens < data.tokens
