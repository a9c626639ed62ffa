"""Constrained requests in whole engines: what they say matches, and nobody else notices them."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, Qwen2Config

from coserve import grammar
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.kernels import dispatch
from coserve.kernels.tape import Tape
from coserve.tokenizer import Tokenizer
from coserve.worker.grammar_masks import GrammarMasks
from tests import tokenizers
from tests.invariants import world

OBJECT = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": -99, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)
WORD = LLMatcher.grammar_from_regex(r"(red|green|blue){2,4}!")
SAMPLED = world.SamplingParams(max_tokens=120, temperature=1.0, seed=4)
PROMPT = list(b"hello world")


def make_model(folder: Path, tokenizer: Tokenizer, eos: int | None, extra: int = 12) -> Path:
    """A random model whose vocabulary is `extra` ids wider than its tokenizer's."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=tokenizer.id_limit + extra,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=eos,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.byte_level()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bytes"), tokenizer, tokenizer.eos_id)


@pytest.fixture(scope="module")
def local(model: Path) -> LocalEngine:
    """An engine that the tests of this file share."""
    return world.make_engine(model)


def text_of(local: LocalEngine, tokenizer: Tokenizer, name: str) -> str:
    return tokenizer.decode(local.tokens[name], continues_text=True)


def run(local: LocalEngine, **requests: world.SamplingParams) -> dict[str, m.RequestOutput]:
    """Requests side by side to their ends: the last output of each."""
    for name, sampling in requests.items():
        local.tokens.pop(name, None)
        local.finished.pop(name, None)
        local.add(name, PROMPT, sampling)
    local.run_until(lambda: all(name in local.finished for name in requests))
    return {name: local.finished[name] for name in requests}


HOW = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.0},
    "hot": {"temperature": 2.0, "seed": 9},
    "filtered": {"temperature": 1.2, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
    "penalized": {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    "biased": {"logit_bias": {65: 100.0, 66: -100.0}, "logprobs": 3},
    "patient": {"min_tokens": 100, "temperature": 0.0},
    "endless": {"ignore_eos": True, "temperature": 0.0},
    "banned": {"bad_words": ((34,), (123,), (44,))},
    "few": {"allowed_token_ids": (68, 1)},
}


@pytest.mark.parametrize("how", HOW)
def test_whatever_the_settings_the_output_matches(local: LocalEngine, tokenizer: Tokenizer, how: str) -> None:
    for text_form, good in (
        (OBJECT, json.loads),
        (WORD, lambda text: re.fullmatch(r"(red|green|blue){2,4}!", text)),
    ):
        ends = run(local, one=replace(SAMPLED, grammar=text_form, **HOW[how]))
        text = text_of(local, tokenizer, "one")
        assert ends["one"].finish_reason == "stop", text
        assert good(text), text
        # The end token is forced at the grammar's end, and no token comes after it.
        assert (
            local.tokens["one"][-1] == tokenizer.eos_id and local.tokens["one"].count(tokenizer.eos_id) == 1
        )


def test_other_requests_do_not_notice(local: LocalEngine) -> None:
    free = {
        "a": replace(SAMPLED, max_tokens=40, ignore_eos=True, logprobs=2),
        "b": replace(SAMPLED, max_tokens=40, temperature=0.0),
        "c": replace(SAMPLED, max_tokens=40, top_k=20, seed=8, presence_penalty=0.5),
    }
    run(local, **free)
    alone = {name: (local.tokens[name], local.logprobs.pop(name, [])) for name in free}
    beside = {f"x{i}": replace(SAMPLED, seed=i, grammar=g) for i, g in enumerate([OBJECT, WORD, OBJECT])}
    run(local, x0=beside["x0"], **free, x1=beside["x1"], x2=beside["x2"])
    assert {name: (local.tokens[name], local.logprobs.pop(name, [])) for name in free} == alone


def test_steps_beside_constrained_requests_play_the_tape(
    local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As steps of free requests do: masks concern the sampler alone."""
    played: list[int] = []
    play = Tape.play

    def counted(tape: Tape) -> torch.Tensor:
        played.append(1)
        return play(tape)

    monkeypatch.setattr(Tape, "play", counted)
    endless = LLMatcher.grammar_from_regex("(red|green){50,}")
    free = replace(SAMPLED, max_tokens=30, ignore_eos=True)
    run(local, a=free, b=replace(free, seed=9), c=replace(free, grammar=endless))
    if dispatch.native is not None:
        assert len(played) >= 25


def test_every_sample_has_a_matcher_of_its_own(local: LocalEngine, tokenizer: Tokenizer) -> None:
    samples = {f"n{i}": replace(SAMPLED, seed=i, temperature=2.0, grammar=OBJECT) for i in range(6)}
    run(local, **samples)
    texts = [text_of(local, tokenizer, name) for name in samples]
    assert len(set(texts)) > 1
    assert all(set(json.loads(text)) == {"name", "age"} for text in texts)
    alone = run(local, n3=samples["n3"])
    assert alone["n3"].finish_reason == "stop" and text_of(local, tokenizer, "n3") == texts[3]


def test_a_cut_ends_in_length_and_a_stop_token_in_stop(local: LocalEngine, tokenizer: Tokenizer) -> None:
    ends = run(
        local,
        cut=replace(SAMPLED, max_tokens=5, grammar=OBJECT),
        stopped=replace(SAMPLED, grammar=OBJECT, stop_token_ids=(ord(":") - 33,)),
    )
    assert ends["cut"].finish_reason == "length" and len(local.tokens["cut"]) == 5
    assert OBJECT and text_of(local, tokenizer, "cut").startswith("{")
    assert ends["stopped"].finish_reason == "stop" and text_of(local, tokenizer, "stopped") == '{"name":'


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (LLMatcher.grammar_from_regex("(a"), "unclosed group"),
        ("start: missing", "missing"),
        (LLMatcher.grammar_from_json_schema({"type": "nonsense"}), "type"),
        (LLMatcher.grammar_from_json_schema({"$ref": "http://elsewhere/x"}), "retriev"),
        ("start: " + '"a" ' * 200_000, "bytes"),
    ],
    ids=["regex", "rule", "schema", "remote", "size"],
)
def test_what_is_no_grammar_is_refused_with_the_reason(local: LocalEngine, grammar: str, reason: str) -> None:
    ends = run(local, bad=replace(SAMPLED, grammar=grammar), good=replace(SAMPLED, max_tokens=3))
    assert ends["bad"].finish_reason == "error" and ends["good"].finish_reason == "length"
    fault = ends["bad"].error
    assert fault is not None and fault.kind == "invalid_value" and reason in fault.message
    assert len(fault.message) < 500 and "\n" not in fault.message
    assert local.tokens.get("bad", []) == []


def test_a_grammar_that_cannot_begin_is_refused_before_its_first_token(
    local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_items_in_row=100, verbose_errors=False))
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(60)}}
    end = run(local, wide=replace(SAMPLED, grammar=LLMatcher.grammar_from_json_schema(wide)))["wide"]
    assert end.error is not None and "too complex" in end.error.message and not local.tokens.get("wide")


def test_a_grammar_that_grows_too_complex_ends_its_request_alone(
    local: LocalEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=400, verbose_errors=False))
    explosive = LLMatcher.grammar_from_regex("((a|b)*a(a|b){12}c)*")
    wild = replace(SAMPLED, max_tokens=400, temperature=2.0, ignore_eos=True, grammar=explosive)
    reached = []
    for _ in range(2):
        # Matchers share what their grammar has grown: the second time it has to begin anew.
        ends = run(local, wild=wild, tame=replace(SAMPLED, grammar=OBJECT))
        assert json.loads(text_of(local, tokenizer, "tame")) and ends["tame"].finish_reason == "stop"
        fault = ends["wild"].error
        assert fault is not None and fault.kind == "invalid_value" and "too complex" in fault.message
        reached.append(local.tokens["wild"])
    assert len(reached[0]) > 20 and reached[0] == reached[1]
    assert not local.engine.masks._matchers


def test_a_long_chain_of_rules_does_not_end_the_process(local: LocalEngine, tokenizer: Tokenizer) -> None:
    """The library follows it by calling itself: on an ordinary stack it would."""
    rules = "\n".join(f't{n}: t{n + 1} "a"' for n in range(7000))
    run(local, one=replace(SAMPLED, max_tokens=4, grammar=f'start: t0\n{rules}\nt7000: "b"'))
    assert text_of(local, tokenizer, "one") == "baaa"


class Slow:
    """A vocabulary that compiles when it is allowed to."""

    def __init__(self, vocabulary: object) -> None:
        self.vocabulary, self.begun, self.go = vocabulary, threading.Event(), threading.Event()

    def compile(self, grammar: str) -> LLMatcher:
        self.begun.set()
        assert self.go.wait(60)
        return self.vocabulary.compile(grammar)


def test_a_grammar_is_compiled_while_others_are_served(model: Path, tokenizer: Tokenizer) -> None:
    local = world.make_engine(model)
    slow = local.engine.grammars._vocabulary = Slow(local.engine.grammars._vocabulary)
    for name in ("first", "second", "gone"):
        local.add(name, PROMPT, replace(SAMPLED, grammar=OBJECT))
    assert slow.begun.wait(60)
    local.engine.step()
    assert local.engine.is_loading and not local.engine.has_work
    assert run(local, free=replace(SAMPLED, max_tokens=20, ignore_eos=True))["free"].finish_reason == "length"
    assert local.engine.scheduler.num_deferred == 3 and not local.finished.keys() & {"first", "second"}
    local.engine.handle(m.AbortRequests(request_ids=["gone"]))
    slow.go.set()
    local.run_until(lambda: {"first", "second"} <= local.finished.keys())
    assert local.tokens["first"] == local.tokens["second"] and json.loads(text_of(local, tokenizer, "first"))
    assert local.finished["gone"].finish_reason == "abort" and not local.tokens["gone"]
    # Known now: the next one waits for nothing.
    slow.go.clear()
    run(local, third=replace(SAMPLED, grammar=OBJECT))
    assert local.tokens["third"] == local.tokens["first"] and not local.engine.is_loading


def test_an_abort_frees_what_is_held(local: LocalEngine) -> None:
    local.add("leaves", PROMPT, replace(SAMPLED, grammar=OBJECT))
    local.run_until(lambda: len(local.tokens.get("leaves", [])) >= 3)
    assert len(local.engine.masks._matchers) == 1
    local.engine.handle(m.AbortRequests(request_ids=["leaves"]))
    assert not local.engine.masks._matchers
    assert local.engine.blocks.num_free == local.engine.blocks.num_blocks


def test_a_preempted_request_goes_on_where_its_grammar_stood(model: Path, tokenizer: Tokenizer) -> None:
    wide = world.make_engine(model, block_size=4, max_model_len=64)
    size = wide.engine.kv.arena.nbytes // wide.engine.blocks.num_blocks
    tight = world.make_engine(model, block_size=4, max_model_len=64, kv_cache_memory_bytes=16 * size)
    for local in (wide, tight):
        run(local, **{f"r{i}": replace(SAMPLED, max_tokens=50, seed=i, grammar=OBJECT) for i in range(4)})
    assert sum(tight.finished[f"r{i}"].num_preemptions for i in range(4)) > 0
    for i in range(4):
        assert tight.tokens[f"r{i}"] == wide.tokens[f"r{i}"]
        assert json.loads(text_of(tight, tokenizer, f"r{i}"))


def test_adapters_answer_by_grammars_too(
    model: Path, tokenizer: Tokenizer, local: LocalEngine, tmp_path: Path
) -> None:
    adapter = world.make_adapter(model, tmp_path / "a", 4, seed=1)
    base = local.generate(PROMPT, replace(SAMPLED, grammar=OBJECT))
    adapted = local.generate(PROMPT, replace(SAMPLED, grammar=OBJECT), adapter)
    assert adapted != base
    assert json.loads(tokenizer.decode(adapted)) and json.loads(tokenizer.decode(base))


def test_a_sentencepiece_vocabulary_spells_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_fallback()
    local = world.make_engine(make_model(tmp_path, tokenizer, tokenizer.eos_id))
    run(local, **{f"s{i}": replace(SAMPLED, max_tokens=200, seed=i, grammar=OBJECT) for i in range(4)})
    for i in range(4):
        assert set(json.loads(text_of(local, tokenizer, f"s{i}"))) == {"name", "age"}


def test_an_adapter_in_training_answers_by_grammars_too(
    model: Path, tokenizer: Tokenizer, data: Path, tmp_path: Path
) -> None:
    local = world.make_engine(model)
    job = world.make_job(data, tmp_path)
    world.submit(local, job)
    local.run_until(lambda: bool(local.take(m.JobProgress)))
    local.add("live", PROMPT, replace(SAMPLED, grammar=OBJECT), live_job=job.job_id)
    local.add("base", PROMPT, replace(SAMPLED, grammar=OBJECT))
    local.run_until(lambda: {"live", "base"} <= local.finished.keys())
    for name in ("live", "base"):
        assert local.finished[name].finish_reason == "stop"
        assert set(json.loads(text_of(local, tokenizer, name))) == {"name", "age"}


@pytest.mark.parametrize("kind", ["pieces", "endless"])
def test_a_model_that_cannot_be_held_to_a_grammar_says_so(tmp_path: Path, kind: str) -> None:
    tokenizer, eos = (tokenizers.word_piece(), 5) if kind == "pieces" else (tokenizers.byte_level(), None)
    local = world.make_engine(make_model(tmp_path, tokenizer, eos))
    local.add("one", [1, 2], replace(SAMPLED, grammar=OBJECT))
    fault = local.finished["one"].error
    assert fault is not None and "can't be constrained" in fault.message
    assert len(local.generate([1, 2], replace(SAMPLED, max_tokens=4, ignore_eos=True))) == 4


def test_only_so_many_grammars_are_kept(
    local: LocalEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coserve.engine.grammars.KEPT", 2)
    for word in ("red", "green", "blue", "red"):
        run(local, one=replace(SAMPLED, grammar=LLMatcher.grammar_from_regex(word)))
        assert text_of(local, tokenizer, "one") == word
    assert len(local.engine.grammars._kept) == 2


_VALUES = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -99, "maximum": 99},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 4},
            {"enum": ["x", 1, None, {"a": [1]}]},
            {"const": 'é"\\'},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda of: {"type": "array", "items": of, "minItems": 1, "maxItems": 3}, inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, needed: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name in needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b b", "ü", "d"]), inner, max_size=3),
            st.sets(st.sampled_from(["a", "b b", "ü", "d"])),
        ),
    ),
    max_leaves=6,
)


@given(schema=_VALUES, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.7, 2.0]))
@settings(max_examples=40, deadline=None)
def test_an_answer_under_a_schema_is_valid(
    local: LocalEngine, tokenizer: Tokenizer, schema: dict, seed: int, temperature: float
) -> None:
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    sampling = replace(SAMPLED, max_tokens=400, seed=seed, temperature=temperature, grammar=grammar)
    end = run(local, one=sampling)["one"]
    assert end.finish_reason == "stop", end
    jsonschema.validate(json.loads(text_of(local, tokenizer, "one")), schema)


def test_masks_follow_the_matcher(local: LocalEngine, tokenizer: Tokenizer) -> None:
    """The mask is what the library says of each token by itself, ids beyond the tokenizer's are banned."""
    vocabulary, V = local.engine.grammars._vocabulary, local.engine.model_config.vocab_size
    matcher = vocabulary.compile(WORD)
    masks = GrammarMasks(V, vocabulary.num_words)
    request = type("Fake", (), {"sequence_id": "x", "end_ids": frozenset([tokenizer.eos_id])})()
    masks.begin(request, matcher.deep_copy())
    for token in tokenizer.encode("redblue!", add_special_tokens=False):
        (words,) = masks.fill([request]).allowed.values()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert not bits[V:].any()
        assert bits.nonzero()[0].tolist() == [
            i for i in range(tokenizer.id_limit) if matcher.validate_tokens([i]) == 1
        ]
        masks.advance(request, token)
        assert matcher.consume_token(token)
    (words,) = masks.fill([request]).allowed.values()
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert bits.nonzero()[0].tolist() == [tokenizer.eos_id]
    masks.forget(request)
    assert not masks.fill([request]).allowed
