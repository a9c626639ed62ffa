"""Train the byte-level BPE tokenizer: ``python -m examples.demo_model.train_tokenizer --out DIR``."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo_model.data import conversations
from examples.demo_model.lexicon import CITIES, COUNTRIES, NAMES, WORDS
from examples.demo_model.render import segments

VOCAB_SIZE = 2048
CONTEXT = 2048
# The order fixes the ids 0..6. Tool markers are not "special": decoding has to keep them for the tool parser.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Words keep their leading space, every digit stands alone so that arithmetic sees one token per digit.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_MARKUP = re.compile("|".join(re.escape(token) for token in SPECIAL + TOOL_MARKERS))
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts to train the merges on: conversations and a flat word list (both with and without a space)."""
    for conversation in itertools.islice(conversations(seed), count):
        for text, _ in segments(conversation):
            yield from _MARKUP.split(text)
    rng = random.Random(seed)
    words = WORDS + NAMES + CITIES + COUNTRIES
    for _ in range(40):
        yield " ".join(rng.sample(words, len(words)))


def build(seed: int = 1, count: int = 20000) -> Tokenizer:
    """Train and return the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    markers = [AddedToken(t, special=False, normalized=False) for t in TOOL_MARKERS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=added + markers,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
    )
    tokenizer.train_from_iterator(corpus(seed, count), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer, its configuration, its special tokens and the chat template."""
    out.mkdir(parents=True, exist_ok=True)
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    template = TEMPLATE.read_text().rstrip("\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in data["added_tokens"]
        },
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    special = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(template)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tokenizer = build(arguments.seed)
    save(tokenizer, arguments.out)
    print(f"{tokenizer.get_vocab_size()} tokens written to {arguments.out}")


if __name__ == "__main__":
    main()
