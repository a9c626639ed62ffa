"""Dates, opposites, small talk about itself, and admitting not to know."""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.demo_model.core import Question, ask, wording_key
from examples.demo_model.lexicon import (
    ANIMALS,
    CITIES,
    COUNTRIES,
    DAYS,
    FOODS,
    ITEMS,
    JOBS,
    MONTH_DAYS,
    MONTHS,
    NOUNS,
    any_city,
    any_name,
    pseudo_word,
)
from examples.demo_model.wordings import wordings

NAME = "coserve-demo"

_MONTH_DAYS = wordings("facts.month_days")
_AFTER = wordings("facts.after")
_BEFORE = wordings("facts.before")
_MONTH_NUMBER = wordings("facts.month_number")
_NUMBER_MONTH = wordings("facts.number_month")
_LATER = wordings("facts.later")
_CALENDAR = (
    (wordings("facts.calendar.0"), "A week has 7 days.", "7"),
    (wordings("facts.calendar.1"), "A year has 12 months.", "12"),
    (wordings("facts.calendar.2"), "A year has 365 days.", "365"),
    (wordings("facts.calendar.3"), "A day has 24 hours.", "24"),
    (wordings("facts.calendar.4"), "An hour has 60 minutes.", "60"),
    (wordings("facts.calendar.5"), "A minute has 60 seconds.", "60"),
    (wordings("facts.calendar.6"), ", ".join(DAYS) + ".", ", ".join(DAYS)),
    (wordings("facts.calendar.7"), ", ".join(MONTHS) + ".", ", ".join(MONTHS)),
    (wordings("facts.calendar.8"), "January is the first month of the year.", "January"),
    (wordings("facts.calendar.9"), "December is the last month of the year.", "December"),
    (wordings("facts.calendar.10"), "February is the shortest month.", "February"),
)


def _neighbour(rng: random.Random, kind: str, names: Sequence[str]) -> Question:
    at, after = rng.randrange(len(names)), rng.random() < 0.6
    wording, user = ask(rng, _AFTER if after else _BEFORE, k=kind, x=names[at])
    other = names[(at + (1 if after else -1)) % len(names)]
    side = "after" if after else "before"
    return Question(
        "dates", f"dates:{side}:{at}:{kind}:{wording}", user, f"{other} comes {side} {names[at]}.", other
    )


def dates(rng: random.Random) -> Question:
    """Calendar facts; split by fact and wording together."""
    roll = rng.random()
    if roll < 0.2:
        return _neighbour(rng, "day", DAYS)
    if roll < 0.4:
        return _neighbour(rng, "month", MONTHS)
    if roll < 0.55:
        at = rng.randrange(12)
        wording, user = ask(rng, _MONTH_DAYS, m=MONTHS[at])
        return Question(
            "dates",
            f"dates:length:{at}:{wording}",
            user,
            f"{MONTHS[at]} has {MONTH_DAYS[at]} days.",
            str(MONTH_DAYS[at]),
        )
    if roll < 0.7:
        at = rng.randrange(12)
        named = rng.random() < 0.5
        wording, user = ask(rng, _MONTH_NUMBER, m=MONTHS[at]) if named else ask(rng, _NUMBER_MONTH, n=at + 1)
        return Question(
            "dates",
            f"dates:number:{named}:{at}:{wording}",
            user,
            f"{MONTHS[at]} is month number {at + 1}.",
            str(at + 1) if named else MONTHS[at],
        )
    if roll < 0.85:
        at, n = rng.randrange(7), rng.randint(2, 6)
        wording, user = ask(rng, _LATER, n=n, x=DAYS[at])
        day = DAYS[(at + n) % 7]
        return Question(
            "dates", f"dates:later:{at}:{n}:{wording}", user, f"{n} days after {DAYS[at]} is {day}.", day
        )
    which = rng.randrange(len(_CALENDAR))
    templates, answer, short = _CALENDAR[which]
    user = ask(rng, templates)[1]
    return Question("dates", wording_key(f"dates:{which}", templates, user), user, answer, short)


_OPPOSITES = wordings("facts.opposites")
_OPPOSITE = wordings("facts.opposite")


def opposites(rng: random.Random) -> Question:
    """Opposites of forty common words, both ways; split by word and wording together."""
    word, other = rng.sample(rng.choice(_OPPOSITES).split(), 2)
    wording, user = ask(rng, _OPPOSITE, w=word)
    return Question(
        "opposites", f"opposite:{word}:{wording}", user, f"The opposite of {word} is {other}.", other
    )


SKILLS = (
    "I can add and subtract, sort numbers, spell and count, convert units, answer calendar questions, "
    "extract data as JSON and call tools."
)
UNKNOWN = "I don't know that. I am a small demo model and only know a few simple things."
_WHO = f"I am {NAME}, a small assistant that runs on coserve."
_SMALL_TALK: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "who": (_WHO, NAME, wordings("facts.who")),
    "name": (f"My name is {NAME}.", NAME, wordings("facts.name")),
    "maker": (
        "I was trained by the coserve project on made-up examples.",
        "coserve",
        wordings("facts.maker"),
    ),
    "skills": (SKILLS, "Simple tasks", wordings("facts.skills")),
    "hello": ("Hello! How can I help you?", "Hello!", wordings("facts.hello")),
    "thanks": ("You are welcome!", "Welcome!", wordings("facts.thanks")),
    "praise": ("Thank you! I am glad to help.", "Thank you!", wordings("facts.praise")),
    "bye": ("Goodbye! Have a nice day.", "Goodbye!", wordings("facts.bye")),
    "mood": ("I am fine, thank you. How can I help you?", "Fine", wordings("facts.mood")),
    "human": ("No, I am a small computer program, not a person.", "No", wordings("facts.human")),
    "bot": ("Yes, I am a small computer program.", "Yes", wordings("facts.bot")),
    "size": (
        "I have about five million parameters, so I am very small.",
        "5 million",
        wordings("facts.size"),
    ),
    "age": ("I am a program, so I have no age.", "None", wordings("facts.age")),
    "joke": ("I don't know any jokes, but I can sort numbers for you.", "No", wordings("facts.joke")),
}
IDENTITY_KINDS = ("who", "name")


def identity(rng: random.Random, kinds: Sequence[str] | None = None) -> Question:
    """Small talk about itself; split by the worded question (before typing noise is added)."""
    kind = rng.choice(kinds or (*_SMALL_TALK, "who", "name", "hello"))
    answer, short, templates = _SMALL_TALK[kind]
    user = ask(rng, templates)[1]
    return Question("identity", wording_key(f"identity:{kind}", templates, user), user, answer, short)


_UNKNOWN = wordings("facts.unknown")


def unknown(rng: random.Random) -> Question:
    """Things it cannot know; the only right answer admits it."""
    fields = {
        "country": rng.choice(COUNTRIES),
        "city": any_city(rng),
        "city2": rng.choice(CITIES),
        "name": any_name(rng),
        "surname": pseudo_word(rng).capitalize(),
        "title": f"The {rng.choice(NOUNS).capitalize()} of {any_city(rng)}",
        "year": rng.randint(1000, 2030),
        "noun": rng.choice(NOUNS),
        "item": rng.choice(ITEMS),
        "animal": rng.choice(ANIMALS),
        "food": rng.choice(FOODS),
        "pseudo": pseudo_word(rng),
        "pseudo2": pseudo_word(rng),
        "job": rng.choice(JOBS),
        "big": rng.randint(200, 99999),
        "language": rng.choice(
            ("French", "German", "Spanish", "Italian", "Japanese", "Latin", "Greek", "Norwegian")
        ),
    }
    user = ask(rng, _UNKNOWN, **fields)[1]
    return Question("unknown", wording_key("unknown", _UNKNOWN, user), user, UNKNOWN, "I don't know")
