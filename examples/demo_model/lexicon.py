"""Word lists and random-word makers used by the question generators.

Everything here is written by hand or made from syllables, so the training data needs no download.
"""

from __future__ import annotations

import random
from pathlib import Path

from examples.demo_model.wordings import read_sections

WORD_LISTS = {
    name: " ".join(lines).split()
    for name, lines in read_sections(Path(__file__).with_name("lexicon.txt")).items()
}
NOUNS = WORD_LISTS["nouns"]
ADJECTIVES = WORD_LISTS["adjectives"]
VERBS = WORD_LISTS["verbs"]
WORDS = sorted(set(NOUNS + ADJECTIVES + VERBS))

NAMES = WORD_LISTS["names"]
CITIES = WORD_LISTS["cities"]
COUNTRIES = WORD_LISTS["countries"]
JOBS = WORD_LISTS["jobs"]
COLORS = WORD_LISTS["colors"]
ANIMALS = WORD_LISTS["animals"]
FOODS = WORD_LISTS["foods"]
ITEMS = WORD_LISTS["items"]
DAYS = WORD_LISTS["days"]
MONTHS = WORD_LISTS["months"]
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
LANGUAGES = WORD_LISTS["languages"]

_ONSETS = WORD_LISTS["onsets"]
_VOWELS = WORD_LISTS["vowels"]
_CODAS = WORD_LISTS["codas"]


def pseudo_word(rng: random.Random, syllables: int | None = None) -> str:
    """A pronounceable lower-case word that is usually not in any dictionary."""
    count = syllables or rng.choice((1, 2, 2, 3))
    parts = []
    for _ in range(count):
        coda = rng.choice(_CODAS) if rng.random() < 0.6 else "-"
        parts.append(rng.choice(_ONSETS) + rng.choice(_VOWELS) + ("" if coda == "-" else coda))
    return "".join(parts)


def letter_string(rng: random.Random, low: int = 2, high: int = 8) -> str:
    """A string of random lower-case letters, so that every token's spelling gets practised."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(low, high)))


def any_word(rng: random.Random, pseudo: float = 0.3) -> str:
    """A lower-case word; with probability ``pseudo`` an invented one."""
    return pseudo_word(rng) if rng.random() < pseudo else rng.choice(WORDS)


def any_name(rng: random.Random) -> str:
    """A given name, sometimes an invented one so that copying is learnt rather than a list of names."""
    return pseudo_word(rng, rng.choice((1, 2, 2))).capitalize() if rng.random() < 0.3 else rng.choice(NAMES)


def any_city(rng: random.Random) -> str:
    """A city name, sometimes an invented one."""
    return pseudo_word(rng, 2).capitalize() if rng.random() < 0.25 else rng.choice(CITIES)
