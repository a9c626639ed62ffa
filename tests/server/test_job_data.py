"""A job's files as data sets: training and validation, what is said of them, what a cut-short run leaves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coserve.errors import DatasetError, InvalidRequest
from coserve.server.application.job_data import Prepared, Sources, prepare, total_steps
from coserve.training.batching import BatchPlan
from coserve.training.dataset import TokenDataset
from coserve.training.job import TrainingSpec
from tests import tokenizers as made

TOKENIZER = made.byte_level()


def chat(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    sources: Sources, folder: Path, training: TrainingSpec | None = None, method: str = "supervised"
) -> Prepared:
    return asyncio.run(prepare(sources, folder, TOKENIZER, training or TrainingSpec(), method, seed=1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", *(chat("hello" * n) for n in range(1, 11)))


def test_a_training_file_alone(file: Path, tmp_path: Path) -> None:
    prepared = run(Sources(file), tmp_path / "job", TrainingSpec(max_length=15))
    counts = prepared.counts
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["data"]
    assert prepared.examples == len(TokenDataset.open(tmp_path / "job" / "data")) == 10
    (first, second) = prepared.remarks()
    assert first[0] == "info" and second[0] == "warn"
    assert f"10 examples of {counts.tokens} tokens, {counts.trained_tokens} of them trained" in first[1]
    assert f"{counts.truncated} examples were cut at the maximal length" in second[1]
    assert f"(training file, {counts.cut_tokens} tokens lost)" in second[1] and counts.cut_tokens > 0


def test_drops_are_told_with_the_reason(tmp_path: Path) -> None:
    silent = chat("hello")
    silent["messages"][1]["weight"] = 0
    prepared = run(Sources(write(tmp_path / "t", chat("hello"), silent)), tmp_path / "job")
    assert (
        "warn",
        "1 row was dropped (training file): no trained token in them",
    ) in prepared.remarks()


def test_a_share_is_held_out(file: Path, tmp_path: Path) -> None:
    training = TrainingSpec(validation_split=0.2, batch_size=4)
    prepared = run(Sources(file), tmp_path / "job", training)
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["data", "validation"]
    parts = [TokenDataset.open(tmp_path / "job" / name) for name in ("data", "validation")]
    assert [len(part) for part in parts] == [8, 2] and (prepared.held_out, prepared.examples) == (2, 8)
    assert prepared.counts.tokens == sum(len(part.tokens) for part in parts)
    assert ("info", "2 of the examples are held out for validation") in prepared.remarks()
    assert total_steps(tmp_path / "job" / "data", training, 1) == 6


def test_a_validation_file_of_its_own(file: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "valid.jsonl", chat("a"), chat("b"))
    prepared = run(Sources(file, other), tmp_path / "job", TrainingSpec(validation_split=0.5))
    assert len(TokenDataset.open(tmp_path / "job" / "validation")) == 2
    assert prepared.held_out == 0 and prepared.examples == 10
    assert any(text.startswith("The validation file has 2 examples") for _, text in prepared.remarks())


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        ([{"text": "x"}], 1, "is a text row; the training file has chat rows"),
        ([chat("a"), {"text": "x"}], 2, "is a text row, line 1 a chat row"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            1,
            "is a preference row; method supervised takes",
        ),
    ],
)
def test_a_validation_file_of_another_kind_is_refused_by_line(
    file: Path, tmp_path: Path, rows: list[Any], line: int, words: str
) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        run(Sources(file, write(tmp_path / "valid.jsonl", *rows)), tmp_path / "job")
    assert caught.value.param == "validation_file" and caught.value.lines[0].line == line
    assert caught.value.message.startswith("1 bad line in the validation file: ")
    assert not (tmp_path / "job" / "data").exists()


def test_a_validation_file_in_another_format_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "valid.csv"
    other.write_bytes("a,b\n".encode("utf-16"))
    with pytest.raises(InvalidRequest, match="the validation file is UTF-16"):
        run(Sources(file, other), tmp_path / "job")


def test_preferences_become_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * n} for n in range(1, 6)]
    training = TrainingSpec(validation_split=0.4, batch_size=2, n_epochs=1)
    prepared = run(Sources(write(tmp_path / "t", *rows)), tmp_path / "job", training, method="dpo")
    data = TokenDataset.open(tmp_path / "job" / "data")
    assert data.pairs and len(data) == 6 and prepared.examples == 3
    assert total_steps(tmp_path / "job" / "data", training, 1) == 2


def test_what_a_run_cut_short_has_left_is_made_again(file: Path, tmp_path: Path) -> None:
    training = TrainingSpec(validation_split=0.2)
    run(Sources(file), tmp_path / "job", training)
    (tmp_path / "job" / "whole.tmp").mkdir()
    again = run(Sources(file), tmp_path / "job")
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["data"] and again.examples == 10


def test_the_server_and_the_engine_count_the_same_steps(file: Path, tmp_path: Path) -> None:
    training = TrainingSpec(packing=True, max_length=40, batch_size=2, n_epochs=2)
    run(Sources(file), tmp_path / "job", training)
    data = tmp_path / "job" / "data"
    plan = BatchPlan(TokenDataset.open(data), training, 1, max_length=2048)
    assert total_steps(data, training, 1) == plan.total_steps < 10
