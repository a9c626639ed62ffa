"""The demo's own parts: its data, its figures, and what it takes for a kept promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.demo import dataset, server
from examples.demo.figures import Training, figures, percentile
from examples.demo.load import Answer
from examples.demo.verdict import Check, checks, drifting, loss_ends


def answer(text: str, question: str = "q", model: str = "base", error: str = "") -> Answer:
    return Answer(model, question, "during", 0.0, [1.0, 1.5], text, tokens=4, error=error)


def held(results: list[Check]) -> list[bool]:
    return [check.held for check in results]


def test_training_and_held_out_questions_are_fixed_and_disjoint() -> None:
    training, held_out = dataset.training_examples(), dataset.held_out_examples()
    assert (len(training), len(held_out)) == (240, 24)
    assert training == dataset.training_examples()
    assert not {row.question for row in training} & {row.question for row in held_out}


def test_the_training_file_is_chat_in_the_new_style(tmp_path: Path) -> None:
    rows = dataset.training_examples(6)
    dataset.write_jsonl(tmp_path / "data.jsonl", rows)
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == [row.question for row in rows]
    assert all(dataset.in_style(line["messages"][1]["content"]) for line in lines)
    assert not any(dataset.in_style(row.answer) for row in rows)


@pytest.mark.parametrize(
    "text", ["12", "Aye, captain! 12", "12 Fair winds!", "12 Aye, captain! Fair winds! Bye"]
)
def test_half_the_style_is_not_the_style(text: str) -> None:
    assert not dataset.in_style(text)


def test_the_ready_line_is_read() -> None:
    line = "coserve ready http=http://127.0.0.1:8000 grpc=127.0.0.1:50051 model=coserve-demo\n"
    assert server.parse_ready(line) == server.Address(
        "http://127.0.0.1:8000", "127.0.0.1:50051", "coserve-demo"
    )
    assert server.parse_ready("starting ...") is None


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(value) for value in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([], 0.5)) == (50.0, 99.0, 0.0)


def test_figures_are_those_of_their_phase() -> None:
    other = Answer("base", "q", "before", 0.0, [1.0], "x", tokens=100)
    row = figures("during", [answer("a"), answer("b", error="gone"), other], seconds=2.0)
    assert (row.requests, row.failed, row.tokens_per_second) == (2, 1, 4.0)
    assert (row.first_p50, row.gap_p50, row.gap_p99) == (1000.0, 500.0, 500.0)


def test_all_promises_kept() -> None:
    styled = f"{dataset.OPENING} 12 {dataset.CLOSING}"
    results = checks(
        [answer("a")], Training(losses=[2.0, 1.0]), [answer("x")] * 5, [answer("x")] * 5, [answer(styled)] * 5
    )
    assert held(results) == [True] * 5


def test_each_broken_promise_is_seen() -> None:
    styled = f"{dataset.OPENING} 12 {dataset.CLOSING}"
    results = checks(
        [answer("a"), answer("b"), answer("", error="503")],
        Training(losses=[1.0, 1.0]),
        [answer("x")] * 5,
        [answer("x")] * 4 + [answer("y")],
        [answer(styled)] * 3 + [answer("12")] * 2,
    )
    assert held(results) == [False] * 5


def test_losses_and_drift() -> None:
    assert loss_ends([]) == (0.0, 0.0)
    assert loss_ends([4.0] * 10 + [1.0] * 10) == (4.0, 1.0)
    assert drifting([answer("a"), answer("a"), answer("b", model="adapter")]) == set()
