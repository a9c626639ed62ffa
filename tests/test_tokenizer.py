import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.errors import ConfigError, InvalidRequest
from coserve.text_stream import StopChecker
from coserve.tokenizer import Tokenizer
from tests import tokenizers as made

BYTE_LEVEL = made.byte_level()
BYTE_FALLBACK = made.byte_fallback()
WORD_PIECE = made.word_piece()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ALL = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK, WORD_PIECE], ids=["bytes", "sp", "wp"])


def write_model_dir(tmp_path, tokenizer=BYTE_LEVEL, **config):
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


# ---------------------------------------------------------------- ids and text


@given(TEXT)
def test_any_text_survives_encoding_and_decoding(text):
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(TEXT)
def test_decoding_equals_the_tokenizers_library(text):
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=20))
def test_byte_level_decoding_of_invalid_bytes_equals_the_tokenizers_library(ids):
    assert BYTE_LEVEL.decode(ids) == BYTE_LEVEL._backend.decode(ids, skip_special_tokens=True)


@ALL
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=60)
def test_streamed_pieces_join_to_the_full_decoding(tokenizer, skip, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    stream = tokenizer.incremental_decoder(skip)
    text = "".join(stream.push([token_id]) for token_id in ids) + stream.finish()
    assert text == tokenizer.decode(ids, skip)
    if tokenizer is WORD_PIECE:
        hidden = tokenizer.special_ids if skip else ()
        visible = [token_id for token_id in ids if token_id not in hidden]
        assert text == tokenizer._backend.decode(visible, skip_special_tokens=False)


@given(TEXT)
def test_a_stream_never_shows_part_of_a_character(text):
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        stream = tokenizer.incremental_decoder()
        shown = ""
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            shown += stream.push([token_id])
            assert text.startswith(shown) or tokenizer.special_text_in(text)
        assert shown + stream.finish() == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))


def test_emoji_comes_out_whole():
    stream = BYTE_LEVEL.incremental_decoder()
    pieces = [stream.push([token_id]) for token_id in BYTE_LEVEL.encode("a👩b")]
    assert [piece for piece in pieces if piece] == ["a", "👩", "b"]


def test_a_cut_off_character_shows_as_a_replacement_at_the_end():
    stream = BYTE_LEVEL.incremental_decoder()
    ids = BYTE_LEVEL.encode("👩")[:2]
    assert stream.push(ids) == ""
    assert stream.finish() == "\ufffd"


def test_window_decoding_lets_garbage_go():
    backend = BYTE_LEVEL._backend
    from coserve.text_stream import WindowDecoder

    stream = WindowDecoder(lambda ids: backend.decode(list(ids), skip_special_tokens=False))
    garbage = BYTE_LEVEL.encode("👩")[1]
    shown = "".join(stream.push(garbage) for _ in range(40))
    assert len(shown) >= 30 and len(stream._window) <= 20


def test_special_tokens_are_skipped_or_kept():
    ids = BYTE_LEVEL.encode("hello<|end|>")
    assert BYTE_LEVEL.decode(ids) == "hello"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "hello<|end|>"
    assert BYTE_LEVEL.eos_token_ids == (ids[-1],)


def test_a_continuation_keeps_its_leading_space():
    ids = BYTE_FALLBACK.encode("hi", add_special_tokens=False)
    assert BYTE_FALLBACK.decode(ids) == "hi"
    assert BYTE_FALLBACK.decode(ids, continues_text=True) == " hi"


def test_token_bytes_spell_the_text():
    text = "hello wörld 👩"
    for tokenizer, prefix in ((BYTE_LEVEL, b""), (BYTE_FALLBACK, b" ")):
        spelt = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
        assert spelt == prefix + text.encode()
    part = BYTE_LEVEL.encode("👩")[0]
    assert BYTE_LEVEL.token_bytes(part) == b"\xf0" and BYTE_LEVEL.token_text(part) == "\ufffd"
    assert BYTE_LEVEL.token_bytes(10**6) == b""


def test_bos_is_added_once_to_plain_text_only():
    tokenizer = made.byte_level(add_bos=True)
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id
    assert tokenizer.encode("<|bos|>hello").count(tokenizer.bos_id) == 1
    assert tokenizer.bos_id not in tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.bos_id not in tokenizer.encode_chat([{"role": "user", "content": "hello"}])


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        BYTE_LEVEL.encode("a\ud800")


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3-mini"])
def test_published_tokenizers(name):
    tokenizer = made.shared(name) or BYTE_LEVEL
    text = "Hello  wörld 你好 👩‍👩‍👧\n\n  indented\tTab"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.incremental_decoder()
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == text == tokenizer.decode(ids)
    encoded = tokenizer.encode_with_offsets(text)
    assert encoded.token_ids == ids and max(end for _, end in encoded.offsets) == len(text)


def test_importing_the_tokenizer_imports_neither_torch_nor_transformers():
    code = "import sys, coserve.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- reading a directory


def test_end_tokens_come_from_all_three_files(tmp_path):
    write_model_dir(tmp_path, eos_token={"content": "<|end|>"})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert Tokenizer.from_dir(tmp_path).eos_token_ids == (3, 4, BYTE_LEVEL.eos_id)


def test_templates_in_order_of_precedence(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_model_dir(tmp_path, chat_template=named)
    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == "J"
    (tmp_path / "mine").write_text("O")
    assert Tokenizer.from_dir(tmp_path, str(tmp_path / "mine")).render_chat(messages) == "O"


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_an_unreadable_template_file_is_a_configuration_error(tmp_path, name):
    write_model_dir(tmp_path)
    (tmp_path / "broken").write_text("{% if %}")
    with pytest.raises(ConfigError, match="template"):
        Tokenizer.from_dir(tmp_path, str(tmp_path / name))


def test_a_directory_without_tokenizer_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


# ---------------------------------------------------------------- chat templates


def test_rendering_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{%- for m in messages %}\n  {%- if loop.index0 > 8 %}{% break %}{% endif %}\n"
        "    {{- '[' + m.role + ']' + m.content }}\n"
        "    {%- for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}\n"
        "{% generation %}{{ m.name if m.name is defined }}{% endgeneration %}{% endfor %}"
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
        "{% if add_generation_prompt %}>{{ flag }}{% endif %}{{ eos_token }}"
    )
    write_model_dir(tmp_path, chat_template=template, bos_token="<|bos|>", eos_token="<|end|>")
    ours = Tokenizer.from_dir(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    messages = [
        {"role": "user", "content": "hëllo <b>", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"ä": "<1>"}}}],
        },
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "größer < kleiner"}}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, flag="on"
        )
        assert ours.render_chat(messages, tools, add_generation_prompt=prompt, flag="on") == expected


def test_tool_arguments_become_objects_and_parts_become_text():
    tokenizer = made.byte_level(
        "{% for m in messages %}{{ m.content }}|{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert tokenizer.render_chat(messages) == "a\nb||Köln"
    assert call["function"]["arguments"] == '{"city": "Köln"}'


def test_continue_final_message_ends_inside_the_message():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    text = BYTE_LEVEL.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|assistant|>\nThe answer")
    with pytest.raises(InvalidRequest, match="exclude each other"):
        BYTE_LEVEL.render_chat(messages, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="with content"):
        BYTE_LEVEL.render_chat([], add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages.append(1) }}", "refuses|cannot render"),
        ("{{ ''.__class__.__mro__ }}", "refuses|cannot render"),
    ],
)
def test_template_errors_name_the_messages(template, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        made.byte_level(template).render_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_refusals_of_what_templates_cannot_take():
    user = {"role": "user", "content": "x"}
    with pytest.raises(InvalidRequest, match="no chat template"):
        made.byte_level(None).render_chat([user])
    with pytest.raises(InvalidRequest, match="content parts") as caught:
        BYTE_LEVEL.render_chat([{"role": "user", "content": [{"type": "image_url"}]}])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest, match="cannot be set"):
        BYTE_LEVEL.render_chat([user], **{"raise_exception": 1})
    with pytest.raises(InvalidRequest, match="arguments must be"):
        call = {"function": {"name": "f", "arguments": "{"}}
        BYTE_LEVEL.render_chat([{"role": "assistant", "content": "", "tool_calls": [call]}])


# ---------------------------------------------------------------- stop strings


def run_stop(pieces, stops, include=False):
    checker = StopChecker(stops, include)
    shown = ""
    for piece in pieces:
        text, stopped_by = checker.feed(piece)
        shown += text
        if stopped_by is not None:
            return shown, stopped_by
    return shown + checker.flush(), None


@pytest.mark.parametrize("include", [False, True])
@given(
    text=st.text("abc", max_size=16),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_stops_do_not_depend_on_how_text_is_cut(include, text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if ends:
        end, start, stop = min(ends)
        expected = (text[: end if include else start], stop)
    else:
        expected = (text, None)
    assert run_stop(pieces, stops, include) == expected
    assert run_stop(list(text), stops, include) == expected


def test_only_what_may_begin_a_stop_is_held_back():
    checker = StopChecker(["\n\nUser"])
    assert checker.feed("fine\n") == ("fine", None)
    assert checker.feed("x\n\nUs") == ("\nx", None)
    assert checker.feed("age") == ("\n\nUsage", None)
    assert checker.feed("!\n\nUser:") == ("!", "\n\nUser")
    assert checker.feed("more") == ("", "\n\nUser")
    assert checker.flush() == ""


def test_old_tokenizer_files_are_converted(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = json.loads(BYTE_LEVEL._backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": len(model["vocab"])}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.from_dir(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "hello wörld 👩"
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == text and ours.eos_id == len(model["vocab"])


def test_broken_old_tokenizer_files_are_a_configuration_error(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not sentencepiece")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match="cannot be converted"):
        Tokenizer.from_dir(tmp_path)
