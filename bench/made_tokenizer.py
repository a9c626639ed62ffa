"""A made tokenizer for models with random weights, so that any server and client can load them.

Byte-level BPE with as many entries as the model's vocabulary: the 256 bytes, then "words" (a space and up
to four letters), each one letter longer than another. A sequence of words decodes to text that encodes to
the same ids, so a client that draws random ids and sends text sends prompts of the length that it meant.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

LETTERS = "abcdefghijklmnopqrst"
SPACE = "\u0120"  # the byte-level alphabet's name of the space


def byte_alphabet() -> list[str]:
    """GPT-2's printable name of each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def write(folder: Path, vocab_size: int, special: dict[int, str]) -> None:
    """Write tokenizer.json and tokenizer_config.json with `vocab_size` entries; `special` are id -> text."""
    words = (
        SPACE + "".join(letters) for length in range(1, 5) for letters in product(LETTERS, repeat=length)
    )
    vocab: dict[str, int] = {}
    merges: list[list[str]] = []
    alphabet = iter(byte_alphabet())
    for index in range(vocab_size):
        token = special.get(index) or next(alphabet, "")
        if not token:
            token = next(words)
            merges.append([token[:-1], token[-1]])
        vocab[token] = index
    added = [
        {"id": index, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, text in sorted(special.items())
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    end = special[max(special)]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
