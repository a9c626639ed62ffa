"""The families of tools: names, parameters, requests, argument values and results."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.demo_model.lexicon import (
    DAYS,
    ITEMS,
    LANGUAGES,
    MONTHS,
    NOUNS,
    any_city,
    any_name,
    any_word,
    pseudo_word,
)
from examples.demo_model.wordings import wordings

Values = tuple[str | int, ...]
Outcome = tuple[dict[str, str | int], str]
Result = Callable[[random.Random, Values], Outcome]


@dataclass(frozen=True)
class Kind:
    """One family of tools: its possible names, parameter names, requests and results."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    requests: tuple[str, ...]
    values: Callable[[random.Random], Values]
    result: Result
    few: bool = False  # too few argument values for a held-out share


def _weather(rng: random.Random, v: Values) -> Outcome:
    degrees, sky = (
        rng.randint(-20, 40),
        rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "warm", any_word(rng))),
    )
    key, sky_key = (
        rng.choice(("temperature", "temp", "temperature_c", "temp_c", "degrees", "celsius")),
        rng.choice(("condition", "conditions", "sky", "weather", "description", "forecast", "wind")),
    )
    return {key: degrees, sky_key: sky}, f"It is {degrees} degrees and {sky} in {v[0]}."


def _clock(rng: random.Random, v: Values) -> Outcome:
    time = f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
    return {"time": time}, f"It is {time} in {v[0]}."


def _date(rng: random.Random, v: Values) -> Outcome:
    date = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
    return {"date": date}, f"Today is {date}."


def _calc(sign: str) -> Result:
    def result(rng: random.Random, v: Values) -> Outcome:
        a, b = int(v[0]), int(v[1])
        value = {"+": a + b, "x": a * b}[sign]
        return {"result": value}, f"{a} {sign} {b} = {value}."

    return result


def _expression_result(rng: random.Random, v: Values) -> Outcome:
    a, sign, b = str(v[0]).split()
    value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    return {"result": value}, f"The result is {value}."


def _done(template: str) -> Result:
    def result(rng: random.Random, v: Values) -> Outcome:
        return {"status": rng.choice(("ok", "done", "success"))}, template.format(*v)

    return result


def _number(key: str, low: int, high: int, template: str) -> Result:
    def result(rng: random.Random, v: Values) -> Outcome:
        value = rng.randint(low, high)
        return {key: value}, template.format(*v, value=value)

    return result


def _word(key: str, template: str) -> Result:
    def result(rng: random.Random, v: Values) -> Outcome:
        value = " ".join(any_word(rng, 0.4) for _ in range(rng.randint(1, 3)))
        return {key: value}, template.format(*v, value=value)

    return result


def _topic(rng: random.Random) -> str:
    return rng.choice(
        (rng.choice(NOUNS), f"{rng.choice(NOUNS)} {rng.choice(NOUNS)}", any_name(rng), pseudo_word(rng))
    )


def _big_expression(rng: random.Random) -> Values:
    return (f"{rng.randint(2, 999)} {rng.choice('+-*')} {rng.randint(2, 999)}",)


def _kind(name: str, values: Callable[[random.Random], Values], result: Result, few: bool = False) -> Kind:
    """The kind whose wordings are in the ``tool.<name>.*`` sections."""
    names, descriptions, parameters, requests = (
        wordings(f"tool.{name}.{part}") for part in ("names", "descriptions", "parameters", "requests")
    )
    return Kind(
        names, descriptions, tuple(tuple(p.split()) for p in parameters), requests, values, result, few
    )


def _city_values(r: random.Random) -> Values:
    return (any_city(r),)


def _two_numbers(largest: int) -> Callable[[random.Random], Values]:
    return lambda r: (r.randint(0, r.choice((largest, 999))), r.randint(0, r.choice((largest, 999))))


def _message(r: random.Random) -> Values:
    return any_name(r), " ".join(any_word(r, 0.1) for _ in range(r.randint(1, 5)))


def _money(r: random.Random) -> Values:
    return r.randint(1, 999), *r.sample(("USD", "EUR", "GBP", "NOK", "JPY", "SEK", "CHF"), 2)


def _symbol(r: random.Random) -> Values:
    return ("".join(r.choice("ABCDEFGHIKLMNOPRSTUVXYZ") for _ in range(r.randint(3, 4))),)


def _reminder(r: random.Random) -> Values:
    return f"{r.choice(('buy', 'clean', 'wash', 'sell', 'fix'))} the {r.choice(NOUNS)}", r.choice(DAYS)


_ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office", "cellar", "garden")

KINDS: tuple[Kind, ...] = (
    _kind("get_weather", _city_values, _weather),
    _kind("get_time", _city_values, _clock),
    _kind("add", _two_numbers(50), _calc("+")),
    _kind("multiply", _two_numbers(12), _calc("x")),
    _kind("calculator", _big_expression, _expression_result),
    _kind("search", lambda r: (_topic(r),), _word("result", "I found this: {value}.")),
    _kind("set_timer", lambda r: (r.randint(1, 120),), _done("The timer is set for {0} minutes.")),
    _kind("send_message", _message, _done("I sent the message to {0}.")),
    _kind("convert_currency", _money, _number("amount", 1, 9999, "{0} {1} is {value} {2}.")),
    _kind(
        "translate",
        lambda r: (any_word(r, 0.1), r.choice(LANGUAGES)),
        _word("translation", "{0} in {1} is {value}."),
    ),
    _kind("play_music", lambda r: (_topic(r),), _done("Playing {0} now.")),
    _kind("turn_on_light", lambda r: (r.choice(_ROOMS),), _done("The light in the {0} is on."), few=True),
    _kind("get_stock_price", _symbol, _number("price", 1, 999, "{0} costs {value} dollars.")),
    _kind(
        "roll_dice",
        lambda r: (r.choice((4, 6, 8, 10, 12, 20)),),
        _number("value", 1, 20, "The dice shows {value}."),
        few=True,
    ),
    _kind("create_reminder", _reminder, _done("I will remind you to {0} on {1}.")),
    _kind(
        "book_table",
        lambda r: (pseudo_word(r).capitalize(), r.randint(2, 12)),
        _done("The table at {0} for {1} people is booked."),
    ),
    _kind("get_date", lambda r: (), _date, few=True),
    _kind(
        "find_product", lambda r: (r.choice(ITEMS),), _number("price", 1, 999, "A {0} costs {value} dollars.")
    ),
    _kind("get_population", _city_values, _number("population", 1000, 999999, "{0} has {value} people.")),
)

_ACTIONS = (
    "get",
    "find",
    "open",
    "close",
    "delete",
    "create",
    "check",
    "update",
    "show",
    "start",
    "stop",
    "cancel",
    "load",
    "read",
    "fetch",
    "print",
    "move",
    "clean",
    "track",
    "order",
)
_RESULTS = (
    "status",
    "price",
    "color",
    "owner",
    "size",
    "level",
    "city",
    "weight",
    "total",
    "value",
    "answer",
    "state",
)


def _any_result(rng: random.Random, v: Values) -> Outcome:
    key = rng.choice(_RESULTS)
    value: str | int = rng.randint(0, 999) if rng.random() < 0.5 else any_word(rng, 0.3)
    return {key: value}, f"The {key} is {value}."


def invented_kind(rng: random.Random) -> Kind:
    """A tool family nobody has seen, so that reading the schema is learnt and not a list of tools."""
    action, noun = rng.choice(_ACTIONS), any_word(rng, 0.15)
    numeric = rng.random() < 0.5
    parameter = rng.choice(
        ("id", "number", f"{noun}_id", "index") if numeric else ("name", "key", noun, f"{noun}_name", "code")
    )

    as_text = rng.random() < 0.4

    def values(r: random.Random) -> Values:
        if not numeric:
            return (r.choice((any_word(r), any_name(r))),)
        number = r.randint(1, r.choice((20, 999, 9999)))
        return (str(number) if as_text else number,)

    verb = action.capitalize()
    return Kind(
        (f"{action}_{noun}",),
        (f"{verb} a {noun}.", f"{verb} the {noun} with the given {parameter}."),
        ((parameter,),),
        (
            f"{verb} {noun} {{0}}.",
            f"{verb} the {noun} {{0}}.",
            f"{verb} the {noun} with {parameter} {{0}}.",
            f"I want to {action} {noun} {{0}}.",
            f"{verb} {noun} number {{0}}." if numeric else f"{verb} {noun}: {{0}}",
            f"Use {action}_{noun} with {{0}}.",
        ),
        values,
        _any_result,
    )
