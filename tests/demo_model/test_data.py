"""The generators: seeded, split by construction, right by independent checks."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from examples.demo_model import tasks_extract, tasks_numbers, tasks_words
from examples.demo_model.core import PLAIN, draw, is_held_out
from examples.demo_model.data import TASKS, conversations, held_out
from examples.demo_model.tasks_tools import make_tools, use_tool


def test_same_seed_same_stream() -> None:
    first = list(itertools.islice(conversations(3), 50))
    assert first == list(itertools.islice(conversations(3), 50))
    assert first != list(itertools.islice(conversations(4), 50))
    assert list(held_out(3, 2)) == list(held_out(3, 2))


@pytest.mark.parametrize("task", list(TASKS))
def test_split_is_by_content(task: str) -> None:
    rng = random.Random(5)
    generator = TASKS[task][0]
    train = {draw(generator, rng, False).key for _ in range(300)}
    held = {draw(generator, rng, True).key for _ in range(60)}
    assert not train & held
    assert all(map(is_held_out, held)) and not any(map(is_held_out, train))


def test_held_out_questions_never_occur_in_training() -> None:
    train = {
        (m["content"], a["content"])
        for c in itertools.islice(conversations(1), 3000)
        for m, a in itertools.pairwise(c.messages)
        if m["role"] == "user"
    }
    asked = {
        (c.messages[-2]["content"], c.messages[-1]["content"])
        for task, c in held_out(2024, 40)
        if task in TASKS
    }
    assert len(train) > 5000
    assert not train & asked


def test_held_out_sums_share_no_pair_with_training() -> None:
    rng = random.Random(8)
    pairs = {}
    for held in (False, True):
        answers = [draw(tasks_numbers.sums, rng, held).answer for _ in range(2000)]
        pairs[held] = {tuple(sorted(map(int, re.match(r"(\d+) \+ (\d+)", a).groups()))) for a in answers}
    assert not pairs[False] & pairs[True]


def test_answers_are_right() -> None:
    rng = random.Random(9)
    for _ in range(300):
        a, b, total = map(
            int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\.", tasks_numbers.sums(rng).answer).groups()
        )
        assert a + b == total
        spelled = tasks_words.spell(rng)
        assert spelled.answer.replace("-", "") in spelled.user.lower()
        record = json.loads(tasks_extract.extract(rng).answer)
        assert record
        words = tasks_words.sort_words(rng).answer.split(", ")
        assert words == sorted(words)


def test_tool_use_matches_the_schema() -> None:
    rng = random.Random(10)
    for _ in range(200):
        for tool in make_tools(rng):
            arguments = use_tool(rng, tool, False).call["arguments"]
            properties = tool.schema["function"]["parameters"]["properties"]
            assert tuple(arguments) == tool.parameters
            for name, value in arguments.items():
                assert (properties[name]["type"] == "string") == isinstance(value, str)


def test_plain_wordings_are_for_training() -> None:
    assert not is_held_out(PLAIN)
    asked = {m["content"] for c in itertools.islice(conversations(1), 4000) for m in c.messages}
    assert {"Who are you?", "What is your name?", "Hello!"} <= asked
