"""What is trained of a row: its text, tokens and labels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.training.chat_rows import ROLES
from tests import tokenizers as made
from tests.training.data_rows import (
    ANSWER,
    TOKENIZER,
    USER,
    chat,
    encode,
    encode_pair,
    refusal_of,
    trained_text,
)

# ---------------------------------------------------------------- what is trained


def test_assistant_turns_are_trained_with_their_end_and_without_their_header():
    system = {"role": "system", "content": "be kind"}
    example = encode(chat(system, USER, ANSWER, USER, {"role": "assistant", "content": "bye"}), TOKENIZER)
    assert trained_text(example) == ["hello<|end|>", "bye<|end|>"]
    assert example.token_ids == TOKENIZER.encode_chat(
        [system, USER, ANSWER, USER, {"role": "assistant", "content": "bye"}], add_generation_prompt=False
    )
    assert example.token_ids.count(TOKENIZER.eos_id) == 5


def test_the_tokens_before_a_turn_are_what_the_model_sees_when_it_answers():
    example = encode(chat(USER, ANSWER), TOKENIZER)
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert example.token_ids[:first] == TOKENIZER.encode_chat([USER])


def test_weights_choose_the_turns():
    muted = {**ANSWER, "weight": 0}
    assert trained_text(encode(chat(USER, muted, USER, {**ANSWER, "weight": 1}), TOKENIZER)) == [
        "hello<|end|>"
    ]
    assert trained_text(encode(chat(USER, muted), TOKENIZER)) == []


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
    example = encode(chat(*messages), TOKENIZER)
    wanted = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant" and m["weight"]]
    got = trained_text(example)
    assert len(got) == len(wanted)
    for text, answer in zip(got, wanted, strict=True):
        # a header's line break may be merged with those the answer begins with
        assert text.lstrip("\n") == answer.lstrip("\n")


def test_a_conversation_may_begin_with_the_assistant():
    example = encode(chat(ANSWER, USER, ANSWER), TOKENIZER)
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
    assert trained_text(encode(row, tokenizer)) == ['[f {"x": "ü"}]<|end|>', "it is 42<|end|>"]


def test_templates_that_know_no_tools_show_them_as_when_serving():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]},
        {"role": "tool", "content": "41", "tool_call_id": "c"},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
        ANSWER,
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    example = encode(chat(*messages, tools=tools), TOKENIZER)
    called = '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert trained_text(example) == [f"Let me see.{called * 2}<|end|>", "hello<|end|>"]
    assert example.token_ids == TOKENIZER.encode_chat(messages, tools, add_generation_prompt=False)
    assert '<tools>\n{"type": "function"' in example.text and "<tool_response>\n42" in example.text


def test_completions_train_the_completion_and_one_end_token():
    example = encode({"prompt": "hello", "completion": " world"}, TOKENIZER)
    assert trained_text(example) == [" world<|end|>"]
    ended = encode({"prompt": "hello", "completion": " world<|end|>"}, TOKENIZER)
    assert ended.token_ids == example.token_ids and ended.text == example.text
    with_bos = encode({"prompt": "", "completion": "hello"}, made.byte_level(add_bos=True))
    assert with_bos.text == "<|bos|>hello<|end|>" and with_bos.labels[0] == -100
    assert trained_text(with_bos) == ["hello<|end|>"]


def test_a_template_without_end_tokens_trains_the_whole_turn():
    tokenizer = made.byte_level(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert trained_text(encode(chat(USER, ANSWER, USER), tokenizer)) == ["hello\n"]


def test_templates_that_write_earlier_turns_differently():
    """Qwen3 drops the reasoning of earlier turns, Phi-3 ends the whole text with another token."""
    thinking = made.byte_level(
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    row = chat(USER, ANSWER, USER, {"role": "assistant", "content": "bye"})
    assert trained_text(encode(row, thinking)) == ["hello<|end|>", "<think>\n\n</think>\n\nbye<|end|>"]
    closing = made.byte_level(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|bos|>{% endif %}"
    )
    assert trained_text(encode(row, closing)) == ["hello<|end|>", "bye<|end|>"]


def test_a_template_without_the_prefix_property_is_an_error():
    counting = made.byte_level(
        "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    field, reason = refusal_of(chat(USER, ANSWER, USER, ANSWER), counting)
    assert field == "messages[1]" and "renders this turn differently" in reason
    field, _ = refusal_of({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, counting)
    assert field == "completion[0]"


def test_a_template_that_refuses_is_an_error_of_the_line():
    strict = made.byte_level("{{ raise_exception('no system turns') }}")
    field, reason = refusal_of(chat(USER, ANSWER), strict)
    assert field == "messages" and "no system turns" in reason
    assert refusal_of({"prompt": [USER], "completion": [ANSWER]}, strict)[0] == "prompt"


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3-mini"])
def test_published_templates(name):
    tokenizer = made.shared(name) or TOKENIZER
    end = "<|end|>" if tokenizer is TOKENIZER or name != "qwen2.5" else "<|im_end|>"
    row = chat(USER, ANSWER, USER, {"role": "assistant", "content": "bye 你👩"})
    example = encode(row, tokenizer)
    got = [text.strip() for text in trained_text(example, tokenizer)]
    assert got[0] == "hello" + end and got[1].startswith("bye 你👩" + (end if tokenizer is TOKENIZER else ""))
    assert example.token_ids == tokenizer.encode_chat(row["messages"], add_generation_prompt=False)


# ---------------------------------------------------------------- the other kinds of rows


def test_a_developer_is_the_system_and_a_refusal_what_is_said():
    system = {"role": "system", "content": "be kind"}
    plain = encode(chat(system, USER, ANSWER))
    assert encode(chat({**system, "role": "developer"}, USER, ANSWER)) == plain
    refused = {"role": "assistant", "refusal": "hello", "content": None}
    assert encode(chat(system, USER, refused)) == plain
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "hello"}]}
    assert encode(chat(system, USER, part)) == plain


def test_names_reach_the_template():
    tokenizer = made.byte_level(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.name }}: {{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>: {% endif %}"
    )
    row = chat({**USER, "name": "ada"}, ANSWER, parallel_tool_calls=True)
    assert encode(row, tokenizer).text.startswith("<|user|>ada: hi<|end|>")


def test_a_conversation_in_two_parts_trains_only_the_answers_of_the_second():
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "bye"}]}
    example = encode(row)
    assert trained_text(example) == ["bye<|end|>"]
    assert example.token_ids == encode(chat(*row["prompt"], *row["completion"])).token_ids
    longer = {"prompt": [USER], "completion": [{**ANSWER, "weight": 0}, USER, ANSWER]}
    assert trained_text(encode(longer)) == ["hello<|end|>"]


def test_plain_text_is_trained_whole_and_ends_once():
    example = encode({"text": "hello world"})
    assert trained_text(example) == ["hello world<|end|>"] and example.text == "hello world<|end|>"
    assert encode({"text": "hello world<|end|>"}) == example
    with_bos = made.byte_level(add_bos=True)
    once = encode({"text": "hello"}, with_bos)
    assert once.token_ids.count(with_bos.bos_id) == 1 and once.labels[0] == -100
    twice = encode({"text": "<|bos|>hello"}, with_bos)
    assert twice.token_ids == once.token_ids


def test_an_end_token_that_pads_too_is_trained_all_the_same():
    """unsloth#416, llm-course#33: nothing is padded here, so no mask takes the real end for padding."""
    tokenizer = made.byte_level(pad_token="<|end|>")
    assert trained_text(encode(chat(USER, ANSWER), tokenizer), tokenizer) == ["hello<|end|>"]
    assert trained_text(encode({"text": "hello"}, tokenizer), tokenizer) == ["hello<|end|>"]


def test_templated_text_gets_no_special_tokens_of_ours():
    """OpenRLHF#393, trl#1400: one bos where the template writes one, and none where it doesn't."""
    writes_bos = made.byte_level("<|bos|>" + made.CHAT_TEMPLATE, add_bos=True)
    ids = encode(chat(USER, ANSWER), writes_bos).token_ids
    assert ids[0] == writes_bos.bos_id and ids.count(writes_bos.bos_id) == 1
    silent = made.byte_level(add_bos=True)
    assert silent.bos_id not in encode(chat(USER, ANSWER), silent).token_ids
    pasted = encode({"text": "<|bos|><|user|>\nhi<|end|>"}, silent)
    assert pasted.token_ids.count(silent.bos_id) == 1 and pasted.token_ids.count(silent.eos_id) == 1


def test_text_that_ends_in_another_end_token_gets_no_second():
    """One trained end token (trl#1400, trl#3328)."""
    tokenizer = made.byte_level(eos_token_ids=(made.byte_level().token_id("<|bos|>"),))
    assert encode({"text": "hello<|bos|>"}, tokenizer).token_ids[-2:] != [tokenizer.eos_id, tokenizer.eos_id]
    assert trained_text(encode({"text": "hello<|bos|>"}, tokenizer)) == ["hello<|bos|>"]


def test_ids_are_taken_as_they_are():
    ids = TOKENIZER.encode("hello world", add_special_tokens=False)
    for row in ({"token_ids": ids}, {"input_ids": ids, "attention_mask": [1] * len(ids)}):
        example = encode(row)
        assert (example.token_ids, example.labels) == (ids, ids)
    labels = [-100, *ids[1:]]
    assert encode({"token_ids": ids, "labels": labels}).labels == labels


BYE = {"role": "assistant", "content": "bye"}
PREFERENCES = [
    {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [BYE]},
    {"input": {"messages": [USER]}, "preferred_completion": [ANSWER], "non_preferred_completion": [BYE]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [BYE]},
    {"chosen": [USER, ANSWER], "rejected": [USER, BYE]},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=["openai", "openai-spec", "trl", "trl-implicit"])
def test_the_forms_of_a_preference_are_one(row):
    chosen, rejected = encode_pair(row)
    assert chosen == encode(chat(USER, ANSWER)) and rejected == encode(chat(USER, BYE))


def test_earlier_answers_are_the_prompt_of_a_preference():
    chosen, rejected = encode_pair({"chosen": [USER, BYE, USER, ANSWER], "rejected": [USER, BYE, USER, BYE]})
    assert trained_text(chosen) == ["hello<|end|>"] and trained_text(rejected) == ["bye<|end|>"]


def test_preferences_as_text():
    chosen, rejected = encode_pair({"prompt": "say:", "chosen": " hello", "rejected": " bye"})
    assert (trained_text(chosen), trained_text(rejected)) == ([" hello<|end|>"], [" bye<|end|>"])
    assert chosen.text == "say: hello<|end|>"
    assert encode_pair({"chosen": "say: hello", "rejected": "say: bye"}) == (chosen, rejected)
    short, long = encode_pair({"chosen": "say", "rejected": "say it"})
    assert (trained_text(short), trained_text(long)) == (["y<|end|>"], ["y it<|end|>"])


def test_tools_of_a_preference_reach_both_answers():
    template = "{{ tools | tojson if tools else '' }}" + made.CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "f"}}]
    for row in (
        {**PREFERENCES[0], "input": {"messages": [USER], "tools": tools}},
        {**PREFERENCES[2], "tools": tools},
    ):
        chosen, rejected = encode_pair(row, made.byte_level(template))
        assert '"name": "f"' in chosen.text and '"name": "f"' in rejected.text
