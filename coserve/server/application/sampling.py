"""Sampling fields of a request, checked once: OpenAI's, vLLM's extras, and what is refused by name."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from coserve.core.sampling_params import SamplingParams
from coserve.errors import InvalidRequest
from coserve.server.application.request_fields import REFUSED, REFUSED_PREFIX, WITHOUT_EFFECT
from coserve.server.application.structured_output import Constraint, read_constraint
from coserve.server.fields import Fields
from coserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_N = 128
MAX_STOPS = 16
MAX_BAD_WORDS = 256
MAX_BAD_WORD = 128
MAX_BIASES = 1024
MAX_LOGPROB_TOKEN_IDS = 128
MAX_SALT = 128
MAX_SEED = 2**64


@dataclass(frozen=True)
class SamplingDefaults:
    """What the model's generation_config.json sets for requests that leave it open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dir(cls, path: str | Path) -> SamplingDefaults:
        """Read a model directory; a missing or odd file means the plain defaults."""
        try:
            data = json.loads((Path(path) / "generation_config.json").read_text("utf-8"))
        except (OSError, ValueError):
            return cls()
        if not isinstance(data, dict):
            return cls()
        known = {
            name: type(getattr(cls, name))(data[name])
            for name in cls.__dataclass_fields__
            if isinstance(data.get(name), int | float) and not isinstance(data.get(name), bool)
        }
        if data.get("do_sample") is False:
            known["temperature"] = 0.0
        return cls(**known)


@dataclass(frozen=True)
class SamplingRules:
    """What requests are held to and filled in with: the model's vocabulary and defaults, the server's limits.

    `max_logprobs` -1: the whole vocabulary. `seeds` gives the seed of a request that brings none.
    """

    tokenizer: Tokenizer
    vocab_size: int
    defaults: SamplingDefaults = SamplingDefaults()
    max_logprobs: int = 20
    stream_interval: int = 1
    seeds: random.Random = field(default_factory=random.SystemRandom)


@dataclass(frozen=True)
class SamplingRequest:
    """All that a request says about choosing tokens and giving them out.

    `max_tokens` None: up to the context's end; with `max_tokens_by_default` it gives way to a long prompt.
    `sampling.seed` is the seed of the first of `n` samples; the others follow by counting on.
    `truncate_prompt_tokens` -1: to what leaves room for the answer. `grammar_field` asked for the grammar.
    `shown_token_ids` are special tokens that are part of the text also where these are skipped.
    """

    sampling: SamplingParams
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    max_tokens_by_default: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    cache_salt: str = ""
    stream_interval: int = 1
    shown_token_ids: frozenset[int] = frozenset()
    grammar_field: str = ""

    def sampling_for(self, index: int, max_tokens: int) -> SamplingParams:
        """Settings of sample `index` with its token limit resolved."""
        seed = (self.sampling.seed + index) % MAX_SEED
        return msgspec.structs.replace(self.sampling, max_tokens=max_tokens, seed=seed)

    def truncated(self, prompt: list[int], max_model_len: int) -> list[int]:
        """The part of a prompt that is kept: its end, or its beginning with `truncation_side` right."""
        kept = self.truncate_prompt_tokens
        if kept is None:
            return prompt
        if kept < 0:
            kept = max(1, max_model_len - (self.max_tokens or 1))
        if len(prompt) <= kept:
            return prompt
        return prompt[:kept] if self.truncation_side == "right" else prompt[len(prompt) - kept :]


def refuse_unsupported(fields: Fields) -> None:
    """Raise InvalidRequest for a field that would change the output and can't be honoured."""
    for name in fields.body:
        if not fields.has(name):
            continue
        if name.startswith(REFUSED_PREFIX):
            raise fields.fail(name, "is not supported; use structured_outputs.")
        if name in REFUSED and fields.raw(name) is not False:
            raise fields.fail(name, f"{REFUSED[name]}.")
    modalities = fields.strings("modalities")
    if modalities is not None and modalities != ["text"]:
        raise fields.fail("modalities", 'must be ["text"]: this server makes text only.')
    penalty = fields.number("length_penalty", 1.0)
    if penalty != 1.0:
        raise fields.fail("length_penalty", "is not supported: there is no beam search.")
    for name in fields.object("vllm_xargs").body if fields.has("vllm_xargs") else ():
        raise fields.fail(f"vllm_xargs.{str(name)[:60]}", "is not known: this server has no extensions.")
    for name, (kind, _) in WITHOUT_EFFECT.items():
        getattr(fields, kind)(name)


def read_logprobs(fields: Fields, name: str, rules: SamplingRules) -> int | None:
    """How many alternatives a field asks for, -1 being the whole vocabulary; None where it doesn't."""
    value = fields.integer(name, None, -1)
    if value is None:
        return None
    most = rules.vocab_size if rules.max_logprobs < 0 else rules.max_logprobs
    if value < 0 and most < rules.vocab_size:
        raise fields.fail(name, f"-1, the whole vocabulary, needs --max-logprobs -1; here at most {most}.")
    if value > most:
        raise fields.fail(name, f"must be at most {most} (--max-logprobs), not {value}.")
    return value if value >= 0 else rules.vocab_size


def _token_limit(fields: Fields, default: int | None, allow_zero: bool) -> int | None:
    name = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    value = fields.integer(name, default)
    if value is not None and value < (0 if allow_zero else 1):
        hint = "" if allow_zero else " (0 scores a prompt: /v1/completions with echo)"
        raise fields.fail(name, f"must be at least {0 if allow_zero else 1}, not {value}{hint}.")
    return value


def _stops(fields: Fields) -> tuple[str, ...]:
    raw = fields.raw("stop")
    stops = [raw] if isinstance(raw, str) else fields.strings("stop") or []
    if len(stops) > MAX_STOPS:
        raise fields.fail("stop", f"must have at most {MAX_STOPS} strings, not {len(stops)}.")
    if "" in stops:
        raise fields.fail("stop", "must not hold an empty string.")
    return tuple(stops)


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    ids = fields.integers(name) or []
    check_token_ids(ids, vocab_size, fields.path + name)
    return tuple(dict.fromkeys(ids))  # each once: a body may repeat one a million times


def _allowed_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = _token_ids(fields, "allowed_token_ids", vocab_size)
    if fields.has("allowed_token_ids") and not ids:
        raise fields.fail("allowed_token_ids", "must not be empty: nothing could be chosen.")
    return ids


def _logprob_token_ids(fields: Fields, vocab_size: int, logprobs: int | None) -> tuple[int, ...]:
    ids = _token_ids(fields, "logprob_token_ids", vocab_size)
    if ids and logprobs is None:
        raise fields.fail("logprob_token_ids", "needs logprobs.")
    if len(ids) > MAX_LOGPROB_TOKEN_IDS:
        raise fields.fail("logprob_token_ids", f"must name at most {MAX_LOGPROB_TOKEN_IDS}, not {len(ids)}.")
    return ids


def _bad_words(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of words that must not come: as they stand, and as they would go on after a space."""
    words = fields.strings("bad_words") or []
    if len(words) > MAX_BAD_WORDS:
        raise fields.fail("bad_words", f"must have at most {MAX_BAD_WORDS} words, not {len(words)}.")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise fields.fail("bad_words", "must not hold an empty word.")
        if len(word) > MAX_BAD_WORD:
            raise fields.fail("bad_words", f"must hold words of at most {MAX_BAD_WORD} characters.")
        plain, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        found[plain] = None
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found[spaced] = None
    return tuple(found)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest unless every id is in the model's vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}.", param=param
            )


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    raw = fields.raw("logit_bias")
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise fields.fail("logit_bias", "must map token ids to numbers.")
    if len(raw) > MAX_BIASES:
        raise fields.fail("logit_bias", f"must have at most {MAX_BIASES} tokens; or use allowed_token_ids.")
    biases = Fields({str(key): value for key, value in raw.items()}, fields.path + "logit_bias.")
    result: dict[int, float] = {}
    for key in biases.body:
        if not key.lstrip("-").isdecimal() or len(key) > 12:
            raise fields.fail("logit_bias", f"has a key that is no token id: {key[:40]!r}.")
        check_token_ids([int(key)], vocab_size, fields.path + "logit_bias")
        bias = biases.number(key, None, -100.0, 100.0)
        if bias is None:
            raise biases.fail(key, "must be a number.")
        result[int(key)] = bias
    return result


def parse_sampling(
    fields: Fields,
    rules: SamplingRules,
    *,
    logprobs: int | None,
    default_max_tokens: int | None,
    allow_zero_tokens: bool = False,
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
) -> SamplingRequest:
    """Read and check the sampling fields common to all routes.

    `logprobs` (alternatives beside the sampled token) and, over gRPC, `constraint` differ in form between
    routes, so the caller reads them. Raises InvalidRequest naming the field.
    """
    constraint = read_constraint(fields) if constraint is None else constraint
    max_tokens = _token_limit(fields, default_max_tokens, allow_zero_tokens)
    sampling = SamplingParams(
        max_tokens=max_tokens or 0,
        min_tokens=_min_tokens(fields, max_tokens),
        **_filters(fields, rules),
        seed=_seed(fields, rules),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(fields, rules.vocab_size),
        bad_words=_bad_words(fields, rules.tokenizer),
        allowed_token_ids=_allowed_token_ids(fields, rules.vocab_size),
        stop_token_ids=_token_ids(fields, "stop_token_ids", rules.vocab_size),
        ignore_eos=fields.boolean("ignore_eos"),
        logprobs=logprobs,
        logprob_token_ids=_logprob_token_ids(fields, rules.vocab_size, logprobs),
        prompt_logprobs=prompt_logprobs,
        grammar=constraint.grammar,
    )
    n = fields.integer("n", 1, 1, MAX_N) or 1
    best_of = fields.integer("best_of")
    if best_of is not None and best_of != n:
        raise fields.fail("best_of", f"is not supported beyond n ({n}); ask for n samples and choose.")
    return SamplingRequest(
        sampling=sampling,
        max_tokens=max_tokens,
        n=n,
        stop=_stops(fields),
        include_stop=fields.boolean("include_stop_str_in_output"),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        max_tokens_by_default=not (fields.has("max_tokens") or fields.has("max_completion_tokens")),
        truncate_prompt_tokens=fields.integer("truncate_prompt_tokens", None, -1),
        truncation_side=fields.choice("truncation_side", ("left", "right"), "left") or "left",
        cache_salt=_cache_salt(fields),
        stream_interval=fields.integer("stream_interval", rules.stream_interval, 1) or 1,
        grammar_field=constraint.field,
    )


def _min_tokens(fields: Fields, max_tokens: int | None) -> int:
    least = fields.integer("min_tokens", 0, 0) or 0
    if max_tokens is not None and least > max_tokens:
        raise fields.fail("min_tokens", f"must be at most max_tokens ({max_tokens}), not {least}.")
    return least


def _seed(fields: Fields, rules: SamplingRules) -> int:
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    return seed % MAX_SEED if seed is not None else rules.seeds.getrandbits(63)


def _filters(fields: Fields, rules: SamplingRules) -> dict[str, Any]:
    """The settings for which a model may have defaults of its own."""
    defaults = rules.defaults
    penalty = fields.number("repetition_penalty", defaults.repetition_penalty, 0.0, 10.0)
    if penalty is not None and penalty <= 0.0:
        raise fields.fail("repetition_penalty", "must be greater than 0.")
    top_p = fields.number("top_p", defaults.top_p, 0.0, 1.0)
    if top_p == 0.0:
        raise fields.fail("top_p", "must be greater than 0; use temperature 0 for the likeliest token.")
    return {
        "temperature": fields.number("temperature", defaults.temperature, 0.0, 2.0),
        "top_p": top_p,
        "top_k": max(0, fields.integer("top_k", defaults.top_k, -1) or 0),
        "min_p": fields.number("min_p", defaults.min_p, 0.0, 1.0),
        "repetition_penalty": penalty,
    }


def _cache_salt(fields: Fields) -> str:
    salt = fields.string("cache_salt", None, MAX_SALT)
    if salt == "":
        raise fields.fail("cache_salt", "must not be empty; leave it out to share the cache.")
    return salt or ""


def read_prompt_logprobs(fields: Fields, rules: SamplingRules, streaming: bool) -> int | None:
    """vLLM's `prompt_logprobs`: None, or the number of alternatives for each prompt token."""
    value = read_logprobs(fields, "prompt_logprobs", rules)
    if value is not None and streaming:
        raise fields.fail("prompt_logprobs", "can't be combined with stream.")
    return value


def log_unknown(fields: Fields, known: frozenset[str]) -> None:
    """Fields nobody defined are let pass, as OpenAI-compatible servers do, and noted by their number: what a
    client calls them is its own text."""
    unknown = sum(name not in known for name in fields.body)
    if unknown:
        logger.debug("request has %d unknown fields", unknown)
