"""The chat template: prefix property, tools, tool calls, and equality with the training renderer."""

from __future__ import annotations

import itertools
import json

import pytest
from transformers import AutoTokenizer

from examples.demo_model.data import conversations
from examples.demo_model.render import segments

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather for a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}
DIALOGUE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello! How can I help you?"},
    {"role": "user", "content": "What is the weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 3}'},
    {"role": "assistant", "content": "It is 3 degrees in Oslo."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome!"},
]


def render(tokenizer: AutoTokenizer, messages: list, **options: object) -> str:
    """Render without tokenising."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("skip_system", [False, True])
def test_prompt_is_prefix_of_longer_chat(
    tokenizer: AutoTokenizer, tools: list | None, skip_system: bool
) -> None:
    messages = DIALOGUE[1:] if skip_system else DIALOGUE
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, messages[:index], tools=tools, add_generation_prompt=True)
            longer = render(tokenizer, messages[: index + 1], tools=tools)
            assert longer.startswith(prompt)
            assert longer.endswith("<|im_end|>\n")
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert tokenizer(longer, add_special_tokens=False)["input_ids"][: len(prompt_ids)] == prompt_ids


def test_no_bos_is_added(tokenizer: AutoTokenizer) -> None:
    text = render(tokenizer, DIALOGUE[1:2], add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tool_call_and_response_markup(tokenizer: AutoTokenizer) -> None:
    text = render(tokenizer, DIALOGUE, tools=[WEATHER])
    assert json.dumps(WEATHER) in text
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in text
    )
    assert '<tool_response>\n{"temperature": 3}\n</tool_response><|im_end|>' in text


def test_arguments_may_be_a_json_string(tokenizer: AutoTokenizer) -> None:
    as_text = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    flat = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    wanted = render(tokenizer, [DIALOGUE[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    for call in (as_text, flat):
        assert (
            render(tokenizer, [DIALOGUE[1], {"role": "assistant", "content": None, "tool_calls": [call]}])
            == wanted
        )


def test_several_calls_and_responses(tokenizer: AutoTokenizer) -> None:
    messages = [
        DIALOGUE[1],
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = render(tokenizer, messages)
    assert text.count("<tool_call>") == 2
    assert "Wait.\n<tool_call>" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def test_training_renderer_equals_template(tokenizer: AutoTokenizer) -> None:
    for conversation in itertools.islice(conversations(11), 200):
        fast = "".join(text for text, _ in segments(conversation)) + "\n"
        assert fast == render(tokenizer, conversation.messages, tools=conversation.tools or None)
