"""Questions about words: spelling, counting, reversing, copying, ordering and letter case."""

from __future__ import annotations

import random

from examples.demo_model.core import Question, ask
from examples.demo_model.lexicon import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLORS,
    FOODS,
    NAMES,
    NOUNS,
    VERBS,
    any_city,
    any_name,
    any_word,
    letter_string,
    pseudo_word,
)
from examples.demo_model.wordings import wordings

_SPELL = wordings("words.spell")


def _spelling_word(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return letter_string(rng)
    if roll < 0.25:
        return (any_name(rng) if rng.random() < 0.5 else any_city(rng)).lower()
    return any_word(rng, 0.35)


def spell(rng: random.Random) -> Question:
    """Spell a word with hyphens between the letters."""
    word = _spelling_word(rng)
    answer = "-".join(word)
    return Question("spell", f"spell:{word}", ask(rng, _SPELL, w=word)[1], answer, answer)


_COUNT_LETTERS = wordings("words.count_letters")


def count_letters(rng: random.Random) -> Question:
    """Count the letters of a word, spelling it on the way."""
    word = _spelling_word(rng)
    answer = f"{'-'.join(word)} has {len(word)} letter{'s' if len(word) > 1 else ''}."
    return Question(
        "count_letters", f"letters:{word}", ask(rng, _COUNT_LETTERS, w=word)[1], answer, str(len(word))
    )


_COUNT_LETTER = wordings("words.count_letter")


def count_letter(rng: random.Random) -> Question:
    """Count one letter in a word, spelling the word on the way."""
    word = _spelling_word(rng)
    letter = rng.choice(word) if rng.random() < 0.75 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    count = word.count(letter)
    answer = f"{'-'.join(word)}: the letter {letter} appears {count} time{'' if count == 1 else 's'}."
    user = ask(rng, _COUNT_LETTER, c=letter, w=word)[1]
    return Question("count_one_letter", f"letter:{letter}:{word}", user, answer, str(count))


_COUNT_ITEMS = wordings("words.count_items")
_KINDS = (
    ("words", NOUNS + ADJECTIVES + VERBS),
    ("words", NOUNS),
    ("names", NAMES),
    ("cities", CITIES),
    ("colors", COLORS),
    ("animals", ANIMALS),
    ("foods", FOODS),
    ("numbers", [str(n) for n in range(100)]),
)


def count_items(rng: random.Random) -> Question:
    """Count 1 to 8 comma-separated items, numbering them on the way."""
    kind, pool = rng.choice(_KINDS)
    items = [
        rng.choice(pool) if rng.random() < 0.85 or kind == "numbers" else any_word(rng, 1.0)
        for _ in range(rng.randint(2, 8))
    ]
    user = ask(rng, _COUNT_ITEMS, items=", ".join(items), kind=kind)[1]
    listed = ", ".join(f"{i} {item}" for i, item in enumerate(items, 1))
    return Question(
        "count_items", f"items:{items}", user, f"{listed}. There are {len(items)}.", str(len(items))
    )


_COUNT_WORDS = wordings("words.count_words")


def sentence(rng: random.Random) -> str:
    """A short plain sentence without its full stop."""
    roll = rng.random()
    noun, other = any_word(rng, 0.1), rng.choice(NOUNS)
    if roll < 0.3:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} is {rng.choice(ADJECTIVES)}"
    if roll < 0.5:
        return f"{any_name(rng)} likes {rng.choice(ADJECTIVES)} {noun} and {other}"
    if roll < 0.65:
        return f"I {rng.choice(VERBS)} the {other}"
    if roll < 0.8:
        return f"we {rng.choice(VERBS)} in {any_city(rng)} with the {rng.choice(ADJECTIVES)} {other}"
    return " ".join(any_word(rng, 0.2) for _ in range(rng.randint(2, 7)))


def count_words(rng: random.Random) -> Question:
    """Count the words of a short sentence, numbering them on the way."""
    text = sentence(rng)
    words = text.split()
    listed = ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    user = ask(rng, _COUNT_WORDS, s=text)[1]
    return Question(
        "count_words", f"words:{text}", user, f"{listed}. There are {len(words)} words.", str(len(words))
    )


_REVERSE = wordings("words.reverse")


def reverse(rng: random.Random) -> Question:
    """Reverse a word of 2 to 6 letters, spelling it on the way."""
    word = _spelling_word(rng)
    while not 2 <= len(word) <= 6:
        word = _spelling_word(rng)
    backwards = word[::-1]
    answer = f"{'-'.join(word)} backwards is {'-'.join(backwards)}."
    return Question("reverse", f"reverse:{word}", ask(rng, _REVERSE, w=word)[1], answer, "-".join(backwards))


_FIRST = wordings("words.first")
_LAST = wordings("words.last")


def edge_letter(rng: random.Random) -> Question:
    """First or last letter of a word."""
    word = _spelling_word(rng)
    first = rng.random() < 0.5
    letter = word[0] if first else word[-1]
    user = ask(rng, _FIRST if first else _LAST, w=word)[1]
    answer = f"The {'first' if first else 'last'} letter of {word} is {letter}."
    return Question("first_last_letter", f"edge:{word}", user, answer, letter)


_UPPER = wordings("words.upper")
_LOWER = wordings("words.lower")


def letter_case(rng: random.Random) -> Question:
    """Change one or two words to capital or small letters."""
    words = " ".join(any_word(rng, 0.35) for _ in range(rng.choice((1, 1, 1, 2))))
    up = rng.random() < 0.55
    user = ask(rng, _UPPER, w=words)[1] if up else ask(rng, _LOWER, w=words.upper())[1]
    answer = words.upper() if up else words
    return Question("letter_case", f"case:{words}", user, answer, answer)


_REPEAT = wordings("words.repeat")


def _anything(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.25:
        return " ".join(any_word(rng, 0.4) for _ in range(rng.choice((1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10))))
    if roll < 0.5:
        text = sentence(rng)
        return text[0].upper() + text[1:] + rng.choice((".", "!", ""))
    if roll < 0.6:
        return " ".join(str(rng.randint(0, 999)) for _ in range(rng.randint(1, 5)))
    if roll < 0.7:
        return "-".join((pseudo_word(rng), str(rng.randint(0, 9999)), letter_string(rng, 1, 3).upper()))
    if roll < 0.8:
        return f"{any_name(rng)} {rng.choice(('and', 'or', '&', '+'))} {any_name(rng)}"
    if roll < 0.9:
        user = f"{pseudo_word(rng)}{rng.choice('._')}{any_word(rng)}"
        return f"{user}@{pseudo_word(rng)}.{rng.choice(('com', 'org', 'net'))}"
    return ", ".join(any_name(rng) if rng.random() < 0.5 else any_city(rng) for _ in range(rng.randint(2, 5)))


def repeat(rng: random.Random) -> Question:
    """Copy a text exactly."""
    text = _anything(rng)
    return Question("repeat", f"repeat:{text}", ask(rng, _REPEAT, s=text)[1], text, text)


_SORT_WORDS = wordings("words.sort_words")


def sort_words(rng: random.Random) -> Question:
    """Sort 2 to 5 words with different first letters."""
    words: dict[str, str] = {}
    for _ in range(rng.randint(2, 5)):
        word = any_word(rng, 0.15)
        words.setdefault(word[0], word)
    items = list(words.values())
    answer = ", ".join(sorted(items))
    user = ask(rng, _SORT_WORDS, items=", ".join(items))[1]
    return Question("sort_words", f"sort_words:{sorted(items)}", user, answer, answer)


_PICK_FIRST = wordings("words.pick_first")
_PICK_LAST = wordings("words.pick_last")


def list_item(rng: random.Random) -> Question:
    """First or last item of a list."""
    items = [any_word(rng, 0.2) for _ in range(rng.randint(2, 6))]
    first = rng.random() < 0.5
    user = ask(rng, _PICK_FIRST if first else _PICK_LAST, items=", ".join(items))[1]
    word = items[0] if first else items[-1]
    answer = f"The {'first' if first else 'last'} item is {word}."
    return Question("list_item", f"list_item:{items}", user, answer, word)
