"""The bundled model directory: size, loading, and a few canonical questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.demo_model.evaluate import answer_all, questions_of

LIMIT_BYTES = 16 * 2**20
CANONICAL = (
    ("What is 7 + 5?", "12"),
    ("whats 7+5", "12"),
    ("What is 20 plus 30?", "50"),
    ("Who are you?", "coserve-demo"),
    ("What is your name?", "coserve-demo"),
    ("Sort these numbers: 9, 2, 5.", "2, 5, 9"),
    ("Spell the word cat.", "c-a-t"),
    ("How many letters are in the word cat?", "3"),
    ("What is the capital of France?", "I don't know"),
    ("Extract name and age as JSON: Anna is 31 years old and lives in Oslo.", '{"name": "Anna", "age": 31}'),
)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    """The bundled model in float32, as it is served."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def reply(model: PreTrainedModel, tokenizer: AutoTokenizer, messages: list, tools: list | None = None) -> str:
    """Greedy answer of ``transformers`` itself."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**encoded, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_directory_fits_the_limit(model_dir: Path) -> None:
    assert sum(f.stat().st_size for f in model_dir.iterdir()) <= LIMIT_BYTES


def test_weights_are_bfloat16_and_tied(model_dir: Path) -> None:
    with safe_open(model_dir / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - not a mapping
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_loads_without_missing_or_unexpected_keys(model_dir: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(model_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_config_matches_tokenizer(model: PreTrainedModel, tokenizer: AutoTokenizer) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 2048
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


@pytest.mark.parametrize(("question", "wanted"), CANONICAL)
def test_canonical_questions(
    model: PreTrainedModel, tokenizer: AutoTokenizer, question: str, wanted: str
) -> None:
    assert wanted in reply(model, tokenizer, [{"role": "user", "content": question}])


def test_tool_call_and_answer(model: PreTrainedModel, tokenizer: AutoTokenizer) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the weather for a city.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    messages: list = [{"role": "user", "content": "What is the weather in Oslo?"}]
    text = reply(model, tokenizer, messages, tools)
    call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Oslo"}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"temperature": 17, "condition": "sunny"}'},
    ]
    answer = reply(model, tokenizer, messages, tools)
    assert "17" in answer and "sunny" in answer and "<tool_call>" not in answer


def test_held_out_sample(model: PreTrainedModel, tokenizer: AutoTokenizer) -> None:
    answered = answer_all(model, tokenizer.backend_tokenizer, questions_of(77, 3))
    assert sum(a.right for a in answered) >= 0.9 * len(answered)
