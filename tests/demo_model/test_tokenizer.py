"""The tokenizer is lossless, splits digits and knows its markers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.demo_model.evaluate import DEFAULT_MODEL
from examples.demo_model.train_tokenizer import SPECIAL, TOOL_MARKERS, VOCAB_SIZE

TOKENIZER = AutoTokenizer.from_pretrained(DEFAULT_MODEL)


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_awkward_texts_round_trip() -> None:
    for text in (
        "",
        " ",
        "  a , b . !  'll  n't",
        "\r\n\t\x00",
        "e\u0301 \u00e9 \u2126 \ufb01",
        "日本語 \U0001f600",
        "a\n\n\n b",
    ):
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_digits_are_single_tokens() -> None:
    tokens = TOKENIZER.tokenize("12345 + 678")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("12345678")


def test_markers_are_single_tokens() -> None:
    for index, marker in enumerate(SPECIAL + TOOL_MARKERS):
        assert TOKENIZER(marker, add_special_tokens=False)["input_ids"] == [index]
    assert len(TOKENIZER) == VOCAB_SIZE
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token, TOKENIZER.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_tool_markers_survive_skipping_special_tokens() -> None:
    ids = TOKENIZER("<tool_call>\n{}\n</tool_call><|im_end|>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"
