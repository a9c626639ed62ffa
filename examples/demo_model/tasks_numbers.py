"""Questions about numbers: arithmetic, comparing, sorting, sequences and units."""

from __future__ import annotations

import random

from examples.demo_model.core import Question, ask
from examples.demo_model.wordings import wordings

_SUM = wordings("numbers.sum")
_DIFFERENCE = wordings("numbers.difference")
_PRODUCT = wordings("numbers.product")


def _arithmetic(
    rng: random.Random,
    task: str,
    templates: tuple[str, ...],
    sign: str,
    a: int,
    b: int,
    result: int,
    by_wording: bool = False,
) -> Question:
    wording, user = ask(rng, templates, a=a, b=b)
    low, high = sorted((a, b)) if sign != "-" else (a, b)
    key = f"{task}:{low}:{high}" + (f":{wording}" if by_wording else "")
    return Question(task, key, user, f"{a} {sign} {b} = {result}.", str(result))


# Small numbers are few but often asked for, so they get a share of their own.
_TOPS = (12, 12, 50, 50, 50, 50, 50, 99)


def sums(rng: random.Random) -> Question:
    """Sums; the claim is 0..50, some training goes up to 99. Split by the unordered pair."""
    top = rng.choice(_TOPS)
    a, b = rng.randint(0, top), rng.randint(0, top)
    return _arithmetic(rng, "sums", _SUM, "+", a, b, a + b)


def differences(rng: random.Random) -> Question:
    """Differences of numbers 0..50 (some up to 99), a few of them negative."""
    top = rng.choice(_TOPS)
    a, b = rng.randint(0, top), rng.randint(0, top)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    return _arithmetic(rng, "differences", _DIFFERENCE, "-", a, b, a - b)


def products(rng: random.Random) -> Question:
    """Times tables to 12 x 12. These are facts, so the split is by pair and wording together."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return _arithmetic(rng, "products", _PRODUCT, "x", a, b, a * b, by_wording=True)


_COMPARE = wordings("numbers.compare")
_BIG, _SMALL = ("greater", "larger", "bigger", "more"), ("smaller", "less")


def compare(rng: random.Random) -> Question:
    """Yes / no comparison of two different numbers 0..200."""
    top = rng.choice((20, 100, 100, 200))
    a, b = rng.sample(range(top + 1), 2)
    if rng.random() < 0.3:
        b = max(0, min(200, a + rng.choice((-3, -2, -1, 1, 2, 3)))) if a not in (0, 200) else b
    up = rng.random() < 0.6
    word = rng.choice(_BIG if up else _SMALL)
    truth = (a > b) if up else (a < b)
    answer = f"Yes, {a} is {word} than {b}." if truth else f"No, {a} is not {word} than {b}."
    return Question(
        "compare",
        f"compare:{min(a, b)}:{max(a, b)}",
        ask(rng, _COMPARE, a=a, b=b, word=word)[1],
        answer,
        "Yes" if truth else "No",
    )


_EXTREME = wordings("numbers.extreme")


def _numbers(rng: random.Random, low: int, high: int) -> list[int]:
    return rng.sample(range(rng.choice((10, 20, 50, 100, 100, 100, 200)) + 1), rng.randint(low, high))


def _listed(rng: random.Random, items: list[str]) -> str:
    style = rng.random()
    if style < 0.7:
        return ", ".join(items)
    if style < 0.8:
        return " ".join(items)
    if style < 0.87:
        return ",".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


_OF_TWO = wordings("numbers.of_two")


def _larger_of_two(rng: random.Random) -> Question:
    a, b = rng.sample(range(rng.choice((20, 100, 200)) + 1), 2)
    up = rng.random() < 0.6
    word = rng.choice(("larger", "bigger", "greater", "higher") if up else ("smaller", "lower"))
    value = max(a, b) if up else min(a, b)
    user = ask(rng, _OF_TWO, word=word, a=a, b=b)[1]
    return Question(
        "largest_smallest", f"extreme:{a}:{b}", user, f"The {word} number is {value}.", str(value)
    )


def extreme(rng: random.Random) -> Question:
    """Largest or smallest of 2 to 6 numbers."""
    if rng.random() < 0.2:
        return _larger_of_two(rng)
    nums = _numbers(rng, 2, 6)
    up = rng.random() < 0.5
    word = rng.choice(
        ("largest", "biggest", "highest", "greatest") if up else ("smallest", "lowest", "least")
    )
    value = max(nums) if up else min(nums)
    user = ask(rng, _EXTREME, word=word, nums=_listed(rng, [str(n) for n in nums]))[1]
    return Question("largest_smallest", f"extreme:{nums}", user, f"The {word} number is {value}.", str(value))


_SORT_UP = wordings("numbers.sort_up")
_SORT_DOWN = wordings("numbers.sort_down")


def sort_numbers(rng: random.Random) -> Question:
    """Sort 2 to 7 different numbers, ascending unless told otherwise."""
    nums = _numbers(rng, 2, 7)
    down = rng.random() < 0.25
    user = ask(rng, _SORT_DOWN if down else _SORT_UP, nums=_listed(rng, [str(n) for n in nums]))[1]
    answer = ", ".join(str(n) for n in sorted(nums, reverse=down))
    return Question("sort_numbers", f"sort:{sorted(nums)}", user, answer, answer)


_COUNT_UP = wordings("numbers.count_up")
_COUNT_DOWN = wordings("numbers.count_down")


def count_range(rng: random.Random) -> Question:
    """Count up or down between two numbers, at most 16 steps."""
    a = rng.randint(0, 90) if rng.random() < 0.6 else rng.choice((0, 1, 1, 2, 3))
    b = a + rng.randint(2, 15)
    down = rng.random() < 0.3
    first, last = (b, a) if down else (a, b)
    numbers = range(first, last + (-1 if down else 1), -1 if down else 1)
    user = ask(rng, _COUNT_DOWN if down else _COUNT_UP, a=first, b=last)[1]
    answer = ", ".join(str(n) for n in numbers)
    return Question("count_range", f"range:{a}:{b}", user, answer, answer)


_NEXT = {
    1: wordings("numbers.next.1"),
    -1: wordings("numbers.next.-1"),
}
_PARITY = wordings("numbers.parity")
_DOUBLE = ("What is double {a}?", "Double {a}.", "What is twice {a}?", "What is two times {a}?")
_HALF = ("What is half of {a}?", "Halve {a}.", "What is the half of {a}?", "How much is half of {a}?")


def number_facts(rng: random.Random) -> Question:
    """Neighbours, parity, doubles and halves."""
    kind = rng.choice(("next", "next", "parity", "double", "half"))
    a = rng.randint(1, 199) if kind in ("next", "parity") else rng.randint(0, 50)
    if kind == "next":
        step = rng.choice((1, 1, -1))
        user, answer = (
            ask(rng, _NEXT[step], a=a)[1],
            f"{a + step} comes {'after' if step > 0 else 'before'} {a}.",
        )
        return Question("number_facts", f"next:{a}:{step}", user, answer, str(a + step))
    if kind == "parity":
        word = "odd" if a % 2 else "even"
        return Question("number_facts", f"parity:{a}", ask(rng, _PARITY, a=a)[1], f"{a} is {word}.", word)
    # Fifty doubles and halves are facts to be known, so their wording counts for the split.
    if kind == "double":
        wording, user = ask(rng, _DOUBLE, a=a)
        return Question("number_facts", f"double:{a}:{wording}", user, f"Double {a} is {2 * a}.", str(2 * a))
    wording, user = ask(rng, _HALF, a=2 * a)
    return Question("number_facts", f"half:{a}:{wording}", user, f"Half of {2 * a} is {a}.", str(a))


_UNITS = (
    ("cm", ("centimeters", "cm"), "m", ("meters", "m"), 1, 100),
    ("mm", ("millimeters", "mm"), "cm", ("centimeters", "cm"), 1, 10),
    ("m", ("meters", "m"), "km", ("kilometers", "km"), 1, 1000),
    ("g", ("grams", "g"), "kg", ("kilograms", "kg"), 1, 1000),
    ("minutes", ("minutes",), "hours", ("hours",), 1, 60),
    ("seconds", ("seconds",), "minutes", ("minutes",), 1, 60),
    ("hours", ("hours",), "days", ("days",), 1, 24),
    ("days", ("days",), "weeks", ("weeks",), 1, 7),
    ("months", ("months",), "years", ("years",), 1, 12),
)
_CONVERT = wordings("numbers.convert")


def units(rng: random.Random) -> Question:
    """Unit conversions with whole answers. Facts, so the split is by amount, unit and wording."""
    small, small_words, big, big_words, _, factor = rng.choice(_UNITS)
    amount = rng.randint(1, 12 if factor in (7, 12, 24, 60) else 20)
    if rng.random() < 0.5:
        shown, unit, to, source, target = amount, big_words, small_words, big, small
        result = amount * factor
    else:
        shown, unit, to, source, target = amount * factor, small_words, big_words, small, big
        result = amount
    wording, user = ask(rng, _CONVERT, n=shown, unit=rng.choice(unit), to=rng.choice(to))
    answer = f"{shown} {source} is {result} {target}."
    return Question("units", f"units:{source}:{target}:{shown}:{wording}", user, answer, f"{result} {target}")
