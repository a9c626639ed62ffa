"""Tokenizers for tests: tiny ones made on the spot, and real ones where the shared data folder lies beside
the checkout."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from coserve.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SPECIAL = ["<|end|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
_WORDS = [("h", "e"), ("he", "l"), ("hel", "l"), ("hell", "o"), ("Ġ", "w"), ("Ã", "¼"), ("Ċ", "Ċ")]


def byte_level(
    template: str | None = CHAT_TEMPLATE,
    *,
    add_bos: bool = False,
    eos_token_ids: tuple[int, ...] = (),
    **special_tokens: str,
) -> Tokenizer:
    """256 bytes, a few merges, and the special tokens of the template; `special_tokens` names more roles."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for left, right in _WORDS:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=_WORDS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens(_SPECIAL)
    return Tokenizer(
        backend,
        special_tokens={"bos_token": "<|bos|>", "eos_token": "<|end|>", **special_tokens},
        chat_template=template,
        eos_token_ids=eos_token_ids,
        add_bos=add_bos,
    )


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer: visible spaces, single bytes for what it has no word for."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for word in ("▁", "a", "b", "h", "i", "▁h", "▁hi"):
        vocab[word] = len(vocab)
    merges = [("▁", "h"), ("▁h", "i")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


def word_piece() -> Tokenizer:
    """A tokenizer whose tokens are no byte strings: pieces are joined by rules."""
    vocab = {"[UNK]": 0, "hel": 1, "##lo": 2, "world": 3, ",": 4, "[SEP]": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(backend, special_tokens={"eos_token": "[SEP]"})


def shared(name: str) -> Tokenizer | None:
    """A published tokenizer ("qwen2.5", "phi-3-mini"), or None where the data folder isn't there."""
    folder = SHARED / "tokenizers" / name
    return Tokenizer.from_dir(folder) if folder.is_dir() else None
