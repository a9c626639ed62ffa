"""Things the user says about himself and asks for later in the same chat."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.demo_model.core import Question, ask, is_held_out
from examples.demo_model.lexicon import ANIMALS, COLORS, FOODS, JOBS, any_city, any_name
from examples.demo_model.wordings import wordings


@dataclass(frozen=True)
class Fact:
    """A kind of personal fact: how it is told, confirmed, asked for and answered."""

    values: Callable[[random.Random], str]
    told: tuple[str, ...]
    confirmed: str
    asked: tuple[str, ...]
    recalled: str
    missing: str


FACTS: dict[str, Fact] = {
    "name": Fact(
        any_name,
        wordings("memory.name.told"),
        "Nice to meet you, {v}!",
        wordings("memory.name.asked"),
        "Your name is {v}.",
        "You have not told me your name.",
    ),
    "city": Fact(
        any_city,
        wordings("memory.city.told"),
        "{v} sounds like a nice place.",
        wordings("memory.city.asked"),
        "You live in {v}.",
        "You have not told me where you live.",
    ),
    "color": Fact(
        lambda rng: rng.choice(COLORS),
        ("My favorite color is {v}.", "I like the color {v}.", "I love the color {v}."),
        "{v} is a nice color.",
        wordings("memory.color.asked"),
        "Your favorite color is {v}.",
        "You have not told me your favorite color.",
    ),
    "food": Fact(
        lambda rng: rng.choice(FOODS),
        ("My favorite food is {v}.", "I like to eat {v}.", "I love {v}."),
        "I hope you get some {v} soon.",
        wordings("memory.food.asked"),
        "Your favorite food is {v}.",
        "You have not told me your favorite food.",
    ),
    "pet": Fact(
        lambda rng: rng.choice(ANIMALS),
        ("I have a {v}.", "My pet is a {v}.", "I have a pet {v}."),
        "A {v} is a good friend.",
        ("What pet do I have?", "Which pet do I have?", "What is my pet?", "Do you remember my pet?"),
        "You have a {v}.",
        "You have not told me about a pet.",
    ),
    "age": Fact(
        lambda rng: str(rng.randint(5, 99)),
        ("I am {v} years old.", "My age is {v}.", "I'm {v} years old."),
        "{v} is a good age.",
        ("How old am I?", "What is my age?", "Do you remember how old I am?", "Tell me my age."),
        "You are {v} years old.",
        "You have not told me your age.",
    ),
    "job": Fact(
        lambda rng: rng.choice(JOBS),
        ("I work as a {v}.", "My job is {v}.", "I am a {v}."),
        "Being a {v} sounds interesting.",
        ("What is my job?", "What do I work as?", "What's my job?", "Do you remember my job?"),
        "You work as a {v}.",
        "You have not told me your job.",
    ),
}


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def tell(rng: random.Random, kind: str, held_out: bool) -> tuple[str, Question]:
    """The user states a fact of ``kind``; returns its value and the exchange."""
    fact = FACTS[kind]
    while True:
        value = fact.values(rng)
        wording, user = ask(rng, fact.told, v=value)
        key = f"memory:{kind}:{value}:{wording}"
        if is_held_out(key) == held_out:
            answer = _first_upper(fact.confirmed.format(v=value))
            return value, Question("memory", key, user, answer, "Okay")


def recall(rng: random.Random, kind: str, value: str | None) -> Question:
    """The user asks for the fact; ``value`` is ``None`` when it was never told."""
    fact = FACTS[kind]
    user = ask(rng, fact.asked)[1]
    if value is None:
        return Question("memory", f"recall:{kind}", user, fact.missing, "I don't know")
    return Question("memory", f"recall:{kind}:{value}", user, fact.recalled.format(v=value), value)
