"""The preview in the terminal: colours there, brackets in plain text; what is sent of a file."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from coserve.cli import main as command
from coserve.cli import preview


def answer(**fields: Any) -> Any:
    span = SimpleNamespace
    row = SimpleNamespace(
        line=2,
        answer="",
        token_ids=[1, 2, 3],
        labels=[-100, 2, 3],
        spans=[span(text="hi\x1b[2J [bold]", trained=False), span(text="there", trained=True)],
        cut_tokens=0,
        dropped="",
    )
    vars(row).update(fields)
    counts = SimpleNamespace(
        rows=1, examples=1, tokens=3, trained_tokens=2, longest=3, truncated=0, cut_tokens=0, dropped={"x": 2}
    )
    return SimpleNamespace(rows=[row], counts=counts, kind="chat")


def shown(found: Any, encoding: str = "utf-8", **settings: Any) -> str:
    data = io.BytesIO()
    file = io.TextIOWrapper(data, encoding=encoding, write_through=True)
    preview.show(found, Console(file=file, **settings))
    return data.getvalue().decode(encoding)


def test_plain_text_has_brackets() -> None:
    text = shown(answer(), width=40)
    assert text.splitlines() == [
        "--- line 2: 3 tokens, 2 of them trained on",
        "hi\u241b[2J [bold]\u27e6there\u27e7",
        "--- 1 rows (chat), 1 examples, 3 tokens, 2 trained on, the longest 3, 2 dropped (x); "
        "what is trained on stands in \u27e6\u27e7",
    ]
    found = answer(spans=[SimpleNamespace(text="there", trained=True)])
    assert "[[there]]" in shown(found, encoding="ascii")


def test_a_terminal_has_colours_and_heeds_no_sequence_of_the_file() -> None:
    text = shown(answer(), force_terminal=True, color_system="standard")
    assert "\x1b[32mthere" in text and "\u27e6" not in text and "\x1b[2J" not in text


def test_what_becomes_of_a_row_is_said() -> None:
    text = shown(answer(answer="rejected", cut_tokens=7, dropped="no trained token in them"))
    assert "line 2 (rejected): 3 tokens, 2 of them trained on, 7 more cut off, left out: no trained" in text


def test_only_the_first_lines_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"one\ntwo\nthree\nfour")
    assert preview.first_lines(path, 2) == b"one\ntwo\n"
    assert preview.first_lines(path, 9) == path.read_bytes()
    monkeypatch.setattr(preview, "MAX_BYTES", 9)
    assert preview.first_lines(path, 9) == b"one\ntwo\n"
    path.write_bytes(b"x" * 100)
    assert preview.first_lines(path, 9) == b"x" * 10


def test_without_a_server_it_says_why_one_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{}")
    where = ["--grpc", "127.0.0.1:9"]
    assert command.run(["finetune", str(path), "--preview", *where]) == 1
    said = capsys.readouterr().err
    assert "no server answers at 127.0.0.1:9" in said and "needs the model's tokenizer" in said
    assert command.run(["finetune", str(path), *where]) == 2
    assert "--adapter NAME is missing" in capsys.readouterr().err
