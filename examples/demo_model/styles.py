"""System prompts: generic ones to ignore, personas, and simple answer styles to follow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.demo_model.core import Question
from examples.demo_model.lexicon import ADJECTIVES, NAMES, any_city, any_name, any_word, pseudo_word
from examples.demo_model.tasks_facts import NAME
from examples.demo_model.wordings import wordings

GENERIC = wordings("styles.generic")


@dataclass(frozen=True)
class Style:
    """A system prompt (``None`` for no system message) and what it does to an answer."""

    system: str | None
    apply: Callable[[Question], str]


def _plain(question: Question) -> str:
    return question.answer


def generic_system(rng: random.Random) -> str:
    """A system prompt that changes nothing about the answers."""
    roll = rng.random()
    if roll < 0.6:
        return rng.choice(GENERIC)
    if roll < 0.8:
        return f"{rng.choice(GENERIC)} {rng.choice(GENERIC)}"
    if roll < 0.9:
        return f"You work with {any_name(rng)} in {any_city(rng)}. {rng.choice(GENERIC)}"
    return f"You are a {rng.choice(ADJECTIVES)} assistant for the {any_word(rng)} {pseudo_word(rng)} company."


def _persona(rng: random.Random) -> Style:
    name = pseudo_word(rng).capitalize() if rng.random() < 0.3 else rng.choice(NAMES)
    system = rng.choice(wordings("styles.persona")).format(n=name)
    return Style(system, lambda q: q.answer.replace(NAME, name))


_OPENERS = wordings("styles.openers")
_CLOSERS = wordings("styles.closers")


def _wrap(rng: random.Random) -> Style:
    before = rng.random() < 0.65
    text = rng.choice(_OPENERS if before else _CLOSERS)
    if rng.random() < 0.4:
        text = (
            " ".join(any_word(rng, 0.3) for _ in range(rng.randint(1, 3))) + rng.choice("!.:")
        ).capitalize()
    verb, noun = (
        rng.choice(("Begin", "Start")) if before else "End",
        rng.choice(("answer", "sentence", "message", "response")),
    )
    system = rng.choice(wordings("styles.wrap")).format(v=verb, w=verb.lower(), n=noun, t=text)
    return Style(system, (lambda q: f"{text} {q.answer}") if before else (lambda q: f"{q.answer} {text}"))


def _short(rng: random.Random) -> Style:
    return Style(rng.choice(wordings("styles.short")), lambda q: q.short)


def _capitals(rng: random.Random) -> Style:
    return Style(rng.choice(wordings("styles.capitals")), lambda q: q.answer.upper())


def _json(rng: random.Random) -> Style:
    key = rng.choice(("answer", "reply", "response", "text", "result", "output", any_word(rng)))
    return Style(rng.choice(wordings("styles.json")).format(k=key), lambda q: json.dumps({key: q.answer}))


STYLES: dict[str, Callable[[random.Random], Style]] = {
    "persona": _persona,
    "opener_closer": _wrap,
    "short": _short,
    "capitals": _capitals,
    "json": _json,
}


def draw_style(rng: random.Random) -> Style:
    """Draw a system prompt for one conversation; most conversations have none or a generic one."""
    roll = rng.random()
    if roll < 0.46:
        return Style(None, _plain)
    if roll < 0.62:
        return Style(generic_system(rng), _plain)
    return rng.choice((*STYLES.values(), _short))(rng)
