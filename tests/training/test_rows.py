"""Which rows are valid, of which kind they are, and what is said of the others."""

import pytest

from coserve.errors import InvalidRequest
from coserve.training.rows import Kind, check_row, kind_of, kinds_of
from tests.training.data_rows import ANSWER, TOKENIZER, USER, chat, refusal_of

BYE = {"role": "assistant", "content": "bye"}
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [BYE]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_ROWS = [
    ({}, "messages", "missing"),
    ([], "", "must be a JSON object"),
    ({"messages": [], "prompt": "x"}, "messages", "either of the kind chat or of the kind prompt/completion"),
    ({"text": "x", "token_ids": [1]}, "text", "not both"),
    ({"prompt": "x", "completion": "y", "chosen": "z"}, "chosen", "not both"),
    (
        chat({"role": "bot", "content": ""}),
        "messages[0].role",
        "one of system, developer, user, assistant, tool",
    ),
    (chat({"role": "function", "content": ""}), "messages[0].role", "; use tool"),
    (chat({**USER, "name": 3}, ANSWER), "messages[0].name", "must be a string"),
    (chat(USER, {**ANSWER, "audio": {"id": "a"}}), "messages[1].audio", "is not supported"),
    (chat({**USER, "refusal": "no"}, ANSWER), "messages[0].refusal", "only assistant"),
    (chat(USER, {**ANSWER, "refusal": "no"}), "messages[1].refusal", "one of the two"),
    (chat(USER, {"role": "assistant", "refusal": 1}), "messages[1].refusal", "must be a string"),
    (chat(USER, ANSWER, parallel_tool_calls="no"), "parallel_tool_calls", "true or false"),
    (
        chat(USER, {**ANSWER, "tool_calls": [CALL, CALL]}, parallel_tool_calls=False),
        "messages[1].tool_calls",
        "has 2 calls",
    ),
    (
        chat(USER, {**ANSWER, "reasoning_content": "so <|end|>"}),
        "messages[1].reasoning_content",
        "special token <|end|>",
    ),
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
    (chat({**ANSWER, "function_call": {"name": "f"}}), "messages[0].function_call", "use tool_calls"),
    (chat(USER, ANSWER, functions=[{}]), "functions", "use tools"),
    (chat(USER, ANSWER, tools="f"), "tools", "must be a list"),
    (chat(USER, ANSWER, tools=[{"name": "f"}]), "tools[0]", "must be"),
    ({"prompt": "x"}, "completion", "missing"),
    ({"prompt": 1, "completion": "x"}, "prompt", "must be a string"),
    ({"prompt": "x", "completion": ""}, "completion", "nothing to train"),
    ({"prompt": "\udfff", "completion": "y"}, "prompt", "lone surrogate"),
    ({"prompt": [USER], "completion": "x"}, "completion", "non-empty list of messages"),
    ({"prompt": [USER], "completion": [USER]}, "completion", "at least one assistant"),
    ({"prompt": [], "completion": [ANSWER]}, "prompt", "non-empty list"),
    ({"text": ""}, "text", "nothing to train"),
    ({"text": ["x"]}, "text", "must be a string"),
    ({"token_ids": []}, "token_ids", "non-empty list of integers"),
    ({"input_ids": [1, 2.0]}, "input_ids[1]", "must be an integer"),
    ({"input_ids": [1, True]}, "input_ids[1]", "must be an integer"),
    ({"token_ids": [1, 9999]}, "token_ids[1]", "vocabulary's ids are 0 to"),
    ({"token_ids": [-1]}, "token_ids[0]", "is -1"),
    ({"token_ids": [1], "input_ids": [1]}, "input_ids", "one of the two"),
    ({"token_ids": [1, 2], "labels": [1]}, "labels", "has 1 entries for 2 tokens"),
    ({"token_ids": [1, 2], "labels": [1, 3]}, "labels[1]", "the token's own id, 2, or -100"),
    ({"token_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask", "leave padding out"),
    ({"token_ids": [1, 2], "completion_mask": [0, 1]}, "completion_mask", "say with labels"),
    ({"token_ids": [1, 2], "position_ids": [0, 1]}, "position_ids", "packs them itself"),
    ({"prompt": "x", "chosen": "y"}, "rejected", "missing"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "rejected", "the same as chosen"),
    ({"prompt": "x", "chosen": [ANSWER], "rejected": [BYE]}, "prompt", "is text beside messages"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": "y"}, "rejected", "list of messages"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "rejected", "the same as chosen"),
    ({"prompt": [USER], "chosen": [{**ANSWER, "weight": 1}], "rejected": [BYE]}, "chosen[0].weight", "whole"),
    ({"chosen": [BYE, USER], "rejected": [BYE, ANSWER]}, "chosen", "after what both begin with"),
    ({"preferred_output": [ANSWER], "non_preferred_output": [BYE]}, "input", "missing"),
    ({"input": {}, "preferred_output": [ANSWER]}, "input.messages", "non-empty list"),
    ({"input": {"messages": [USER]}, "preferred_output": [ANSWER]}, "non_preferred_output", "non-empty list"),
    (
        {**OPENAI, "input": {"messages": [{"role": "bot"}]}},
        "input.messages[0].role",
        "must be one of",
    ),
    ({**OPENAI, "input": {"messages": [USER], "tools": 1}}, "input.tools", "must be a list"),
    (
        {**OPENAI, "preferred_output": [{**ANSWER, "content": "<|end|>"}]},
        "preferred_output[0].content",
        "special token",
    ),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD_ROWS, ids=[f"{f}-{r}" for _, f, r in BAD_ROWS])
def test_bad_rows_are_named(row, field, reason):
    found = refusal_of(row)
    assert found[0] == field and reason in found[1]


def test_kinds_are_told_by_the_fields():
    assert kind_of(chat(USER)) is Kind.CHAT
    assert kind_of({"prompt": "x", "completion": "y", "id": 7, "source": "web"}) is Kind.COMPLETION
    assert kind_of({"text": "x"}) is Kind.TEXT
    assert kind_of({"input_ids": [1], "labels": [1]}) is Kind.TOKENS
    assert kind_of(OPENAI) is kind_of({"prompt": "x", "chosen": "y", "rejected": "z"}) is Kind.PREFERENCE


def test_methods_take_kinds():
    assert kinds_of("dpo") == (Kind.PREFERENCE,)
    assert Kind.PREFERENCE not in kinds_of("supervised") and kinds_of("dft") == kinds_of("supervised")
    with pytest.raises(InvalidRequest, match="supervised, dft, dpo"):
        kinds_of("magic")


def test_fields_of_nobody_are_left_alone():
    row = chat(USER, ANSWER, id=3, source="web")
    assert check_row(row, TOKENIZER) == check_row(chat(USER, ANSWER), TOKENIZER)
