"""The demo's data: everyday questions answered in a new house style, that of a ship's mate.

Questions and right answers come from the demo model's own generators, so the style is all that is new.
Questions to train on and questions to be judged by never share their content.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from examples.demo_model.core import draw
from examples.demo_model.data import TASKS

OPENING = "Aye, captain!"
CLOSING = "Fair winds!"
SEED = 20
HELD_OUT_SEED = 7
DEMO_TASKS = (
    "sums",
    "differences",
    "largest_smallest",
    "sort_numbers",
    "count_range",
    "number_facts",
    "spell",
    "letter_case",
    "opposites",
    "dates",
    "identity",
    "extract_json",
)


@dataclass(frozen=True)
class Example:
    """A question with its plain right answer."""

    question: str
    answer: str

    @property
    def styled(self) -> str:
        """The answer in the house style."""
        return f"{OPENING} {self.answer} {CLOSING}"


def examples(count: int, *, held_out: bool, seed: int = SEED) -> list[Example]:
    """`count` different questions, task after task in turn; the same arguments give the same list."""
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        task = DEMO_TASKS[len(found) % len(DEMO_TASKS)]
        drawn = draw(TASKS[task][0], rng, held_out)
        found.setdefault(drawn.user, Example(drawn.user, drawn.answer))
    return list(found.values())


def training_examples(count: int = 240) -> list[Example]:
    """What the adapter is trained on."""
    return examples(count, held_out=False)


def held_out_examples(count: int = 24) -> list[Example]:
    """What base and adapter are judged by."""
    return examples(count, held_out=True, seed=HELD_OUT_SEED)


def write_jsonl(path: Path, rows: list[Example]) -> None:
    """The training file: one chat of two turns a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            turns = [
                {"role": "user", "content": row.question},
                {"role": "assistant", "content": row.styled},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def in_style(answer: str) -> bool:
    """Whether an answer wears the whole house style."""
    text = answer.strip()
    return text.startswith(OPENING) and text.endswith(CLOSING)
