"""Files read line by line: what is kept, cut, dropped and counted, and what is said of bad ones."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.errors import DatasetError, InvalidRequest
from coserve.training.data_file import (
    CUT_ALIKE,
    CUT_AWAY,
    MAX_LINE_BYTES,
    MAX_LISTED_ERRORS,
    UNTRAINED,
    DataFile,
    bounded_lines,
)
from coserve.training.dataset import TokenDataset
from coserve.training.rows import Kind
from tests.training.data_rows import ANSWER, TOKENIZER, USER, chat, encode, lines

GOOD = chat(USER, ANSWER)


def errors_of(*rows, **settings):
    with pytest.raises(DatasetError) as caught:
        list(DataFile(lines(*rows), TOKENIZER, 0, **settings))
    assert caught.value.param == settings.get("param", "training_file")
    return [(error.line, error.field, error.reason) for error in caught.value.lines]


def refusal_of(*rows, **settings):
    with pytest.raises(InvalidRequest) as caught:
        list(DataFile(rows, TOKENIZER, 0, **settings))
    assert caught.value.code == "invalid_training_file" and not isinstance(caught.value, DatasetError)
    return caught.value.message


# ---------------------------------------------------------------- counts


def test_counts_and_the_data_set(tmp_path):
    long = chat(USER, {"role": "assistant", "content": "hello" * 40})
    late = chat({"role": "user", "content": "hello" * 40}, ANSWER)
    silent = chat(USER, {**ANSWER, "weight": 0})
    file = DataFile(lines(GOOD, long, late, silent), TOKENIZER, 24)
    assert TokenDataset.write(tmp_path / "data", file, pairs=file.pairs) == 2
    counts = file.counts
    assert (counts.rows, counts.examples, counts.truncated) == (4, 2, 1)
    assert counts.dropped == {CUT_AWAY: 1, UNTRAINED: 1}
    assert counts.cut_tokens == len(encode(long).token_ids) - 24
    dataset = TokenDataset.open(tmp_path / "data")
    assert not dataset.pairs and file.kind is Kind.CHAT
    assert counts.tokens == dataset.lengths.sum() and counts.longest == dataset.lengths.max() == 24
    assert counts.trained_tokens == sum(dataset.trained_tokens(i) for i in range(2))


def test_nothing_left_to_train_is_an_error_with_the_count():
    """A run of masked rows must not end well with a loss of 0 (trl#6668, trl#3927, trl#6025)."""
    silent = lines(chat(USER, {**ANSWER, "weight": 0}))[0]
    assert "no row left to train on: 2 dropped, no trained token" in refusal_of(silent, silent)
    for empty in ([], [b"\n", b"  \r\n"], [b"\xef\xbb\xbf"]):
        assert refusal_of(*empty) == "the training file holds no rows"


def test_every_row_is_shown_with_its_line_and_its_fate():
    silent = chat(USER, {**ANSWER, "weight": 0})
    long = chat(USER, {"role": "assistant", "content": "hello" * 40})
    rows = list(DataFile(lines(GOOD, silent, long), TOKENIZER, 24).rows())
    assert [(row.line, row.dropped) for row in rows] == [(1, ""), (2, UNTRAINED), (3, "")]
    assert [row.cut_tokens > 0 for row in rows] == [False, False, True]


# ---------------------------------------------------------------- preferences


def preference(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_preferences_are_written_as_pairs(tmp_path):
    file = DataFile(lines(preference("a", "b", "c"), preference("d", "e", "ff")), TOKENIZER, 0, "dpo")
    assert TokenDataset.write(tmp_path / "data", file, pairs=file.pairs) == 4
    dataset = TokenDataset.open(tmp_path / "data")
    assert dataset.pairs and file.counts.examples == 2 and file.counts.tokens == len(dataset.tokens)
    texts = [TOKENIZER.decode(dataset[i][0].tolist()) for i in range(4)]
    assert texts == ["ab", "ac", "de", "dff"]


def test_the_cut_of_a_preference_keeps_the_prompt_and_some_of_both_answers():
    """trl#5285, trl#2209: never the prompt's start, never a whole answer; else the pair goes, counted."""
    rows = [
        preference("pppp", "aaaaaaaa", "b"),  # the longer answer is cut
        preference("p" * 9, "a", "b"),  # no room for an answer
        preference("p" * 7, "xya", "xyb"),  # what tells them apart is cut off
        preference("p" * 7, "xa", "xyb"),
    ]
    file = DataFile(lines(*rows), TOKENIZER, 9, "dpo")
    kept = list(file)
    assert file.counts.dropped == {CUT_AWAY: 1, CUT_ALIKE: 1} and file.counts.examples == 2
    texts = [TOKENIZER.decode(ids, skip_special_tokens=False) for ids, _ in kept]
    assert texts == ["ppppaaaaa", "ppppb<|end|>", "pppppppxa", "pppppppxy"]
    assert all(any(label != -100 for label in labels) for _, labels in kept)
    assert (file.counts.truncated, file.counts.cut_tokens) == (2, 4 + 1 + 2)


TEXT = st.text("ab c", min_size=1, max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4), st.integers(1, 20))
@settings(max_examples=150)
def test_whatever_is_kept_of_a_preference_begins_with_the_whole_prompt(rows, limit):
    rows = [preference(prompt, a, b) for prompt, a, b in rows if a != b]
    file = DataFile(lines(*rows), TOKENIZER, limit, "dpo")
    found = list(file.rows())
    assert len(found) == len(rows) == file.counts.examples + sum(file.counts.dropped.values())
    for row, original in zip(found, rows, strict=True):
        texts = [TOKENIZER.decode(example.token_ids, skip_special_tokens=False) for example in row.examples]
        whole = [original["prompt"] + original[name] + "<|end|>" for name in ("chosen", "rejected")]
        assert all(full.startswith(text) for full, text in zip(whole, texts, strict=True))
        if not row.dropped:
            assert all(len(text) > len(original["prompt"]) for text in texts) and texts[0] != texts[1]
        else:
            assert row.cut_tokens


def test_methods_refuse_the_rows_of_others():
    pair = preference("a", "b", "c")
    (error,) = errors_of(pair, pair, method="supervised")
    assert (
        error[0] == 1 and "is a preference row; method supervised takes chat, prompt/completion" in error[2]
    )
    assert error[2].endswith("preferences are for the method dpo")
    (error,) = errors_of(GOOD, method="dpo")
    assert "is a chat row; method dpo takes preference rows" in error[2]


def test_a_file_has_one_kind_of_rows():
    found = errors_of(b"{x", GOOD, {"text": "x"}, GOOD, {"prompt": "x", "completion": "y"})
    assert [line for line, _, _ in found] == [1, 3, 5]
    assert found[1][2] == "is a text row, line 2 a chat row; a file has one kind of rows"


def test_tokens_without_an_embedding_are_named():
    """A tokenizer that was given tokens its model never got would end the engine, not the job."""
    end = TOKENIZER.token_id("<|end|>")
    with pytest.raises(DatasetError) as caught:
        list(DataFile(lines({"text": "ab"}, GOOD), TOKENIZER, 0, vocab_size=end))
    assert [error.line for error in caught.value.lines] == [1, 2]
    assert f"(id {end}), for which the model has no embedding: it has {end}" in caught.value.lines[0].reason
    assert len(list(DataFile(lines({"text": "ab"}), TOKENIZER, 0, vocab_size=end + 1))) == 1


# ---------------------------------------------------------------- lines and files


def test_bom_crlf_and_blank_lines_at_the_end_are_tolerated():
    good = json.dumps(GOOD).encode()
    data = DataFile([b"\xef\xbb\xbf" + good + b"\r\n", good, b"\r\n", b"\n"], TOKENIZER, 0)
    assert len(list(data)) == 2


def test_blank_lines_in_the_middle_are_errors():
    assert errors_of(GOOD, b"", b" ", GOOD) == [(2, "", "is empty"), (3, "", "is empty")]
    with pytest.raises(DatasetError) as caught:
        list(DataFile([*[b"\n"] * 5000, json.dumps(GOOD).encode()], TOKENIZER, 0))
    assert caught.value.total == 5000 and len(caught.value.lines) == MAX_LISTED_ERRORS


def test_all_bad_lines_are_reported_with_line_and_field():
    found = errors_of(
        b"{x}",
        GOOD,
        b"\xff\xfe{",
        [1],
        chat({"role": "bot", "content": ""}),
        b"[" * 9999,
        param="validation_file",
    )
    assert [(line, field) for line, field, _ in found] == [
        (1, ""),
        (3, ""),
        (4, ""),
        (5, "messages[0].role"),
        (6, ""),
    ]
    assert "not valid JSON" in found[0][2] and "not UTF-8" in found[1][2] and "JSON object" in found[2][2]


def test_many_bad_lines_are_counted_and_the_first_listed():
    with pytest.raises(DatasetError, match=r"70 bad lines: line 1: .* \(and 20 more\)") as caught:
        list(DataFile([b"nope\n"] * 70, TOKENIZER, 0))
    assert caught.value.total == 70 and len(caught.value.lines) == MAX_LISTED_ERRORS


@pytest.mark.parametrize(
    ("beginning", "words"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "zip archive"),
        (b"(\xb5/\xfd\x04", "zstd"),
        (b"PAR1\x15\x00", "Parquet"),
        ("\ufeff{}".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("{}".encode("utf-16-be"), "is UTF-16"),
        ("{}".encode("utf-16-le"), "is UTF-16"),
        (b"[\n", "one JSON array"),
        (b'[{"messages": []},\n', "one JSON array"),
        (b"\xef\xbb\xbf{\r\n", "over several lines"),
    ],
)
def test_files_that_are_no_json_lines_are_told(beginning, words):
    found = refusal_of(beginning, b"more\n", param="validation_file")
    assert found.startswith("the validation file ") and words in found


def test_a_huge_line_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr("coserve.training.data_file.MAX_LINE_BYTES", 1000)
    good = lines(GOOD)[0]
    file = io.BytesIO(good + b'{"text": "' + b"x" * 5000 + b'"}\n' + good)
    with pytest.raises(DatasetError, match="1 bad line: line 2: is over"):
        list(DataFile(bounded_lines(file), TOKENIZER, 0))


def test_lines_come_as_the_file_has_them():
    data = b"a\n\nbb\r\n" + b"c" * 100
    assert list(bounded_lines(io.BytesIO(data))) == io.BytesIO(data).readlines()
    huge = io.BytesIO(b"x" * (3 * MAX_LINE_BYTES) + b"\nlast")
    first, last = bounded_lines(huge)
    assert len(first) == MAX_LINE_BYTES + 1 and last == b"last"
