"""Text to token ids and back, and a conversation to token ids. Free of torch.

A model directory's `tokenizer.json` is read by the tokenizers library; only where it is missing
(SentencePiece-only directories) is transformers imported to convert it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from coserve.chat_template import ChatTemplate, Message, find_template
from coserve.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from coserve.text_stream import BytesDecoder, IncrementalDecoder, StopChecker, WindowDecoder

__all__ = ["EncodedText", "IncrementalDecoder", "StopChecker", "Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_COUNTED = 2**16  # characters at a time of a text that may be too long
_FEW, _MANY = 4, 16  # characters a token: a text of fewer is read, one of more is never so few tokens
_SPACE_MARK = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True)
class EncodedText:
    """Token ids with the [start, end) characters of the text that each one covers."""

    token_ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """A model's tokenizer with its chat template and its end-of-sequence ids."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
        add_bos: bool = False,
    ) -> None:
        """`special_tokens` maps names ("bos_token", ...) to their text; `add_bos` makes sure that plain text
        begins with the bos token even where the tokenizer file itself doesn't add it."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.most_tokens = 0  # of a text that `encode` reads; 0: any number
        self._special_names = dict(special_tokens or {})
        self._template = ChatTemplate(chat_template, self._special_names) if chat_template else None
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        eos_ids = dict.fromkeys(eos_token_ids)
        if self.eos_id is not None:
            eos_ids[self.eos_id] = None
        self.eos_token_ids: tuple[int, ...] = tuple(eos_ids)
        self._bos_to_add = self.bos_id if add_bos else None
        self._style = _DecodingStyle.of(json.loads(backend.to_str()).get("decoder"))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_dir(
        cls, path: str | Path, chat_template: str | None = None, model: str | Path | None = None
    ) -> Tokenizer:
        """Read a model directory; `chat_template` is the path of a template file that replaces the model's,
        `model` the directory that says which tokens end an output, where that is another one.

        Raises ConfigError when the directory has no tokenizer or one that can't be read.
        """
        directory = Path(path)
        config = _read_json(directory / "tokenizer_config.json")
        special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name)))}
        for name, value in _read_json(directory / "special_tokens_map.json").items():
            if name in _SPECIAL_NAMES and (text := _token_text(value)):
                special.setdefault(name, text)
        eos_ids: list[int] = []
        for file in ("generation_config.json", "config.json"):
            value = _read_json(Path(model or directory) / file).get("eos_token_id")
            eos_ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
        return cls(
            _load_backend(directory),
            special_tokens=special,
            chat_template=find_template(directory, config, chat_template),
            eos_token_ids=eos_ids,
            add_bos=config.get("add_bos_token") is True,
        )

    # ---------------------------------------------------------------- ids and text

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included (the model's embedding may have more rows)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def id_limit(self) -> int:
        """One more than the largest id (ids may have gaps)."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` those the model expects around it (bos).

        Raises ContextLengthExceeded for a text far over `most_tokens`, without reading it to its end: a body
        of 32 MiB would take minutes and gigabytes.
        """
        self._check_length(text)
        # Of the library's calls only that for batches lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch([_valid(text)], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if add_special_tokens and self._bos_to_add is not None and ids[:1] != [self._bos_to_add]:
            ids.insert(0, self._bos_to_add)
        return ids

    def _check_length(self, text: str) -> None:
        if not self.most_tokens or len(text) <= _FEW * self.most_tokens:
            return
        # Cut anywhere, a text has a few tokens more; twice the limit is over it however it is cut.
        count, start = 0, 0
        while count <= 2 * self.most_tokens and len(text) <= _MANY * self.most_tokens:
            if start >= len(text):
                return
            (piece,) = self._backend.encode_batch(
                [_valid(text[start : start + _COUNTED])], add_special_tokens=False
            )
            count += len(piece.ids)
            start += _COUNTED
        raise ContextLengthExceeded(
            f"The text has over {self.most_tokens} tokens, which is more than is read at once.",
            param="input_tokens",
        )

    def encode_with_offsets(self, text: str) -> EncodedText:
        """Token ids of `text`, without extra special tokens, and the characters each of them covers. Raises
        ContextLengthExceeded as `encode` does."""
        self._check_length(text)
        if len(text) <= _COUNTED:
            encoding = self._offset_backend.encode(_valid(text), add_special_tokens=False)
        else:  # slower, but others run meanwhile
            (encoding,) = self._offset_backend.encode_batch([_valid(text)], add_special_tokens=False)
        return EncodedText(encoding.ids, encoding.offsets)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, continues_text: bool = False
    ) -> str:
        """Text of `ids`. `continues_text` keeps the leading space of a SentencePiece continuation."""
        decoder = self.incremental_decoder(skip_special_tokens, continues_text)
        return decoder.push(ids) + decoder.finish()

    def incremental_decoder(
        self,
        skip_special_tokens: bool = True,
        continues_text: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> IncrementalDecoder:
        """A fresh stream of ids to text, equal to `decode` with the same settings once finished; special
        tokens that are `shown` are never skipped."""
        hidden = self.special_ids - shown if skip_special_tokens else frozenset()
        if self._style.by_bytes:
            strip = self._style.strip_space and not continues_text
            return IncrementalDecoder(BytesDecoder(self.token_bytes, strip), hidden)
        return IncrementalDecoder(
            WindowDecoder(lambda ids: self._backend.decode(list(ids), skip_special_tokens=False)), hidden
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for: maybe part of a UTF-8 character; empty for an unused id."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._added.get(token_id)
            if token is None:
                token = self._backend.id_to_token(token_id)
            known = self._style.bytes_of(token) if token is not None else b""
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text, incomplete characters shown as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the one token written exactly so, or None."""
        return self._backend.token_to_id(text)

    def added_token_id(self, text: str) -> int | None:
        """The id of the added token (special or not) written exactly so, or None."""
        return self._added_ids.get(text)

    def special_text_in(self, text: str) -> str | None:
        """The first special token whose text occurs in `text`, or None."""
        if self._special_starts.isdisjoint(text):  # some models have thousands of special tokens
            return None
        return next((token for token in self.special_texts if token in text), None)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    # ---------------------------------------------------------------- conversations

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation's text by the model's chat template, or by the source of another; InvalidRequest
        when there is none, it can't be read, or it refuses the messages."""
        if template is not None:
            try:
                chosen: ChatTemplate | None = ChatTemplate(template, self._special_names)
            except ConfigError as error:
                raise InvalidRequest(f"chat_template: {error}", param="chat_template") from error
        else:
            chosen = self._template
        if chosen is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or start with --chat-template",
                param="messages",
            )
        return chosen.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of `render_chat`; the template writes its special tokens itself, so none are added."""
        text = self.render_chat(messages, tools, add_generation_prompt, continue_final_message, **kwargs)
        return self.encode(text, add_special_tokens=False)

    # ---------------------------------------------------------------- inside

    def _named_id(self, name: str) -> int | None:
        text = self._special_names.get(name)
        return self._backend.token_to_id(text) if text else None

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {text: token_id for token_id, text in self._added.items()}

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, or None."""
        return self._template.source if self._template is not None else None

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens."""
        return tuple(self._added[token_id] for token_id in sorted(self.special_ids))

    @cached_property
    def _special_starts(self) -> frozenset[str]:
        return frozenset(text[0] for text in self.special_texts if text)

    @cached_property
    def eos_texts(self) -> tuple[str, ...]:
        """The texts of the tokens that end generation."""
        return tuple(text for token_id in self.eos_token_ids if (text := self.token_text(token_id)))

    @cached_property
    def _offset_backend(self) -> tokenizers.Tokenizer:
        # GPT-2 style post-processors trim spaces off the offsets: a turn's first character would move.
        clone = tokenizers.Tokenizer.from_str(self._backend.to_str())
        clone.post_processor = processors.ByteLevel(
            add_prefix_space=False, trim_offsets=False, use_regex=False
        )
        return clone


@dataclass(frozen=True)
class _DecodingStyle:
    """How tokens spell bytes: GPT-2's byte alphabet, SentencePiece with byte fallback, or neither."""

    byte_level: bool = False
    byte_fallback: bool = False
    strip_space: bool = False

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None) -> _DecodingStyle:
        """Read it off the `decoder` entry of a tokenizer.json."""
        if decoder is None:
            return cls()
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        if "ByteFallback" not in kinds or set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip"}:
            return cls()
        replaced = [
            (step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"
        ]
        strips = [(step["content"], step["start"], step["stop"]) for step in steps if step["type"] == "Strip"]
        if replaced != [(_SPACE_MARK, " ")] or strips not in ([], [(" ", 1, 0)]):
            return cls()
        return cls(byte_fallback=True, strip_space=bool(strips))

    @property
    def by_bytes(self) -> bool:
        return self.byte_level or self.byte_fallback

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return token.encode("utf-8")
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode("utf-8")
        return token.replace(_SPACE_MARK, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 bytes as themselves, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest("the text holds a lone surrogate, which is not valid Unicode") from error
    return text


def _token_text(value: Any) -> str | None:
    """A special token's text, which files give as a string or as an AddedToken object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} of the model is not valid JSON: {error}", param="model") from error
    return value if isinstance(value, dict) else {}


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise ConfigError(f"the model's tokenizer.json cannot be read: {error}", param="model") from error
    if not any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        raise ConfigError(
            f"{directory.name!r} has no tokenizer.json; put the model's tokenizer files beside its weights",
            param="model",
        )
    import transformers  # slow to import, and needed only to convert old tokenizer files

    try:
        converted = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return converted.backend_tokenizer
    except Exception as error:
        raise ConfigError(
            f"the tokenizer of {directory.name!r} cannot be converted ({error}); save a tokenizer.json there",
            param="model",
        ) from error
