"""Extraction of fields from a sentence as a JSON object."""

from __future__ import annotations

import json
import random

from examples.demo_model.core import Question, ask
from examples.demo_model.lexicon import (
    COLORS,
    DAYS,
    ITEMS,
    JOBS,
    MONTHS,
    any_city,
    any_name,
    pseudo_word,
)
from examples.demo_model.wordings import wordings

Record = dict[str, str | int]


def _person(rng: random.Random) -> tuple[str, Record]:
    name, city, job, age = any_name(rng), any_city(rng), rng.choice(JOBS), rng.randint(1, 99)
    an = "an" if job[0] in "aeiou" else "a"
    forms: tuple[tuple[str, tuple[str, ...]], ...] = (
        (f"{name} is {age} years old and lives in {city}.", ("name", "age", "city")),
        (f"{name} lives in {city} and is {age} years old.", ("name", "city", "age")),
        (f"{name}, {age}, lives in {city}.", ("name", "age", "city")),
        (f"{name} ({age}) is {an} {job} in {city}.", ("name", "age", "job", "city")),
        (f"{name} is {an} {job} from {city}.", ("name", "job", "city")),
        (f"{name} works as {an} {job} in {city}.", ("name", "job", "city")),
        (f"My name is {name} and I am {age} years old.", ("name", "age")),
        (f"I am {name}, {age} years old, from {city}.", ("name", "age", "city")),
        (f"My name is {name}. I live in {city}.", ("name", "city")),
        (f"{name} is {age}.", ("name", "age")),
        (f"{name} is {age} years old.", ("name", "age")),
        (f"{name} is a {age} year old {job} from {city}.", ("name", "age", "job", "city")),
        (f"Meet {name}, {an} {job}. {name} is {age} and comes from {city}.", ("name", "job", "age", "city")),
        (f"{name} from {city} is {age} years old.", ("name", "city", "age")),
    )
    text, keys = rng.choice(forms)
    values: Record = {"name": name, "age": age, "city": city, "job": job}
    return text, {key: values[key] for key in keys}


def _order(rng: random.Random) -> tuple[str, Record]:
    item, count, price, name = rng.choice(ITEMS), rng.randint(2, 60), rng.randint(1, 500), any_name(rng)
    color = rng.choice(COLORS)
    forms: tuple[tuple[str, tuple[str, ...]], ...] = (
        (f"{name} ordered {count} {item}s for {price} dollars.", ("name", "quantity", "item", "price")),
        (f"The {color} {item} costs {price} dollars.", ("color", "item", "price")),
        (f"The {item} costs {price} dollars.", ("item", "price")),
        (f"{name} bought a {color} {item} for {price} dollars.", ("name", "color", "item", "price")),
        (f"We need {count} {color} {item}s.", ("quantity", "color", "item")),
        (f"Please send {count} {item}s to {name}.", ("quantity", "item", "name")),
        (f"I want to buy {count} {item}s.", ("quantity", "item")),
    )
    text, keys = rng.choice(forms)
    values: Record = {"name": name, "quantity": count, "item": item, "price": price, "color": color}
    return text, {key: values[key] for key in keys}


def _event(rng: random.Random) -> tuple[str, Record]:
    name, city, day = any_name(rng), any_city(rng), rng.choice(DAYS)
    time = f"{rng.randint(0, 23)}:{rng.choice(('00', '15', '30', '45'))}"
    date = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
    event = rng.choice(("meeting", "party", "dinner", "lesson", "concert", "game", "call", "lunch"))
    forms: tuple[tuple[str, tuple[str, ...]], ...] = (
        (f"The {event} is on {day} at {time} in {city}.", ("event", "day", "time", "city")),
        (f"{name} has a {event} on {day} at {time}.", ("name", "event", "day", "time")),
        (f"The {event} with {name} is on {date}.", ("event", "name", "date")),
        (f"There is a {event} in {city} on {date}.", ("event", "city", "date")),
        (f"{name} flies to {city} on {day}.", ("name", "city", "day")),
        (f"The {event} starts at {time}.", ("event", "time")),
    )
    text, keys = rng.choice(forms)
    values: Record = {"name": name, "city": city, "day": day, "time": time, "date": date, "event": event}
    return text, {key: values[key] for key in keys}


def _contact(rng: random.Random) -> tuple[str, Record]:
    name, phone = any_name(rng), f"{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
    email = f"{name.lower()}@{pseudo_word(rng)}.{rng.choice(('com', 'org', 'net'))}"
    forms: tuple[tuple[str, tuple[str, ...]], ...] = (
        (f"{name}'s email is {email}.", ("name", "email")),
        (f"You can reach {name} at {email}.", ("name", "email")),
        (f"Call {name} at {phone}.", ("name", "phone")),
        (f"{name}'s phone number is {phone} and the email is {email}.", ("name", "phone", "email")),
        (f"Contact: {name}, {phone}.", ("name", "phone")),
    )
    text, keys = rng.choice(forms)
    values: Record = {"name": name, "phone": phone, "email": email}
    return text, {key: values[key] for key in keys}


_NAMED = wordings("extract.named")
_ALL = wordings("extract.all")


_OTHER_KEYS = {
    "name": ("person", "user", "first_name"),
    "city": ("town", "location", "place"),
    "job": ("profession", "occupation", "work"),
    "item": ("product", "thing", "article"),
    "quantity": ("amount", "count", "number"),
    "price": ("cost", "dollars"),
}


def _join(rng: random.Random, keys: list[str]) -> str:
    if len(keys) == 1:
        return keys[0]
    if rng.random() < 0.3:
        return ", ".join(keys)
    return ", ".join(keys[:-1]) + " and " + keys[-1]


def extract(rng: random.Random) -> Question:
    """Named fields (in the order named) or all fields (in the order of the text) as one JSON object."""
    text, record = rng.choice((_person, _person, _person, _order, _event, _contact))(rng)
    if rng.random() < 0.7:
        keys = list(record)
        if rng.random() < 0.3:
            rng.shuffle(keys)
        keys = keys[: rng.randint(1, len(keys))] if rng.random() < 0.6 else keys
        named = [rng.choice(_OTHER_KEYS.get(key, (key,))) if rng.random() < 0.3 else key for key in keys]
        user = ask(rng, _NAMED, keys=_join(rng, named), text=text)[1]
        record = {name: record[key] for name, key in zip(named, keys, strict=True)}
    else:
        user = ask(rng, _ALL, text=text)[1]
    answer = json.dumps(record)
    return Question("extract_json", f"extract:{text}", user, answer, answer)
