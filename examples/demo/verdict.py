"""What the demo promises, checked on what it saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from examples.demo.dataset import Example, in_style
from examples.demo.figures import Training
from examples.demo.load import Answer

STYLE_SHARE = 0.8


@dataclass(frozen=True)
class Check:
    """One promise: whether it held, and in words what was seen."""

    held: bool
    what: str


def checks(
    chat: Sequence[Answer],
    training: Training,
    before: Sequence[Answer],
    base: Sequence[Answer],
    adapter: Sequence[Answer],
) -> list[Check]:
    """The demo's promises. `before`, `base` and `adapter` answer the same held-out questions in order:
    the base before the fine-tune, the base after it, the adapter."""
    everything = [*chat, *before, *base, *adapter]
    failed = [answer for answer in everything if answer.error]
    same = sum(old.text == new.text for old, new in zip(before, base))
    styled = sum(in_style(answer.text) for answer in adapter)
    drifted = drifting(chat)
    first, last = loss_ends(training.losses)
    failure = f" (first: {failed[0].error})" if failed else ""
    return [
        Check(not failed, f"{len(everything) - len(failed)} of {len(everything)} requests answered{failure}"),
        Check(last < first, f"loss fell from {first:.3f} to {last:.3f} in {len(training.losses)} steps"),
        Check(
            styled >= STYLE_SHARE * len(adapter),
            f"the adapter answers in the new style on {styled} of {len(adapter)} held-out questions",
        ),
        Check(same == len(base), f"the base answers {same} of {len(base)} exactly as before"),
        Check(not drifted, f"{len(drifted)} chat questions were answered differently beside the training"),
    ]


def drifting(chat: Sequence[Answer]) -> set[tuple[str, str]]:
    """(model, question) pairs that did not get the same greedy answer each time."""
    texts: dict[tuple[str, str], set[str]] = {}
    for answer in chat:
        if not answer.error:
            texts.setdefault((answer.model, answer.question), set()).add(answer.text)
    return {key for key, seen in texts.items() if len(seen) > 1}


def loss_ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of the steps; (0, 0) without any."""
    if not losses:
        return 0.0, 0.0
    count = max(len(losses) // 10, 1)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def answer_table(asked: Sequence[Example], base: Sequence[Answer], adapter: Sequence[Answer]) -> Table:
    """The held-out questions with both answers side by side."""
    table = Table(title="Held-out questions: base beside adapter", title_justify="left")
    for name in ("question", "base", "adapter"):
        table.add_column(name, overflow="fold")
    for example, old, new in zip(asked, base, adapter):
        table.add_row(example.question, old.text, new.text)
    return table
