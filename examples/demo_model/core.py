"""Shared pieces of the question generators: the question type, the split and the wording noise."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HELD_OUT_OF_256 = 26
PLAIN = "plain wording"  # hashes to the training side


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    ``key`` identifies the content for the train / held-out split, ``short`` is the bare answer used by
    system prompts that ask for brevity, ``task`` is the row of the evaluation table.
    """

    task: str
    key: str
    user: str
    answer: str
    short: str


Generator = Callable[[random.Random], Question]


def is_held_out(key: str) -> bool:
    """Whether content ``key`` belongs to the held-out tenth; depends on nothing but the key."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] < HELD_OUT_OF_256


def wording_key(prefix: str, templates: Sequence[str], user: str) -> str:
    """Split key of a fixed question: plain wordings are for training, noisy variants are hashed."""
    return PLAIN if user in templates else f"{prefix}:{user.lower()}"


def draw(generator: Generator, rng: random.Random, held_out: bool) -> Question:
    """Draw from ``generator`` until a question of the wanted split comes up."""
    while True:
        question = generator(rng)
        if is_held_out(question.key) == held_out:
            return question


_CONTRACTIONS = (("What is", "What's"), ("what is", "what's"), ("What is", "Whats"), ("I am", "I'm"))
_PREFIXES = (
    "Hey, {}",
    "Hi! {}",
    "Hello, {}",
    "Ok, {}",
    "Now {}",
    "Quick question: {}",
    "Tell me: {}",
    "Next: {}",
    "And {}",
    "Then {}",
    "So {}",
    "I have a question. {}",
    "Help me with this: {}",
    "Great. {}",
    "Thanks! {}",
)
_ASKS = (
    "Please {}",
    "Can you {}",
    "Could you {}",
    "Can you please {}",
    "Could you please {}",
    "Would you {}",
    "I want you to {}",
    "I need you to {}",
    "Now {}",
    "Please could you {}",
)
_SUFFIXES = (" Thanks!", " Thank you.", " Please.", " please", " Thanks", " thx", " Be quick.")
_VERBISH = re.compile(
    r"^(Add|Spell|Sort|Count|Reverse|Repeat|Extract|Tell|Give|Convert|Order|Arrange|Put|Write|Find|"
    r"Say|Copy|Pick|Multiply|Subtract|Compute|Calculate|Name|List|Turn|Make|Return|Work|Read|Set|"
    r"Get|Show|Send|Play|Book|Translate|Look|Check|Start|Switch|Roll|Remind|Search|Create|Solve)\b"
)


def _typo(rng: random.Random, text: str) -> str:
    """Damage one letter of a word before the first ``{field}``."""
    spots = [m.start() for m in re.finditer(r"(?<=[a-z])[a-z](?=[a-z])", text.partition("{")[0])]
    if not spots:
        return text
    at = rng.choice(spots)
    kind = rng.random()
    if kind < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    if kind < 0.7:
        return text[:at] + text[at + 1 :]
    return text[:at] + text[at] + text[at:]


def _lower_first(text: str) -> str:
    return text if text.startswith(("I ", "{")) else text[:1].lower() + text[1:]


def vary(rng: random.Random, template: str) -> str:
    """Vary the wording of ``template`` (politeness, case, punctuation, typos), leaving ``{fields}`` alone."""
    text = template
    if rng.random() < 0.25:
        old, new = rng.choice(_CONTRACTIONS)
        text = text.replace(old, new)
    if rng.random() < 0.22:
        frame = rng.choice(_ASKS if _VERBISH.match(text) else _PREFIXES)
        text = frame.format("\0").replace("\0", _lower_first(text))
        if frame.startswith(("Can", "Could", "Would")) and text.endswith("."):
            text = text[:-1] + "?"
    if rng.random() < 0.06 and not text.endswith("}"):
        text += rng.choice(_SUFFIXES)
    if rng.random() < 0.2:
        text = text.lower()
    if rng.random() < 0.2 and text[-1] in ".?!":
        text = text[:-1]
    if rng.random() < 0.05:
        text = _typo(rng, text)
    return text


def ask(rng: random.Random, templates: Sequence[str], **fields: object) -> tuple[str, str]:
    """Pick a template, vary its wording and fill in ``fields``; returns ``(name of the template, text)``.

    Templates that contractions make equal share a name, so that split keys built on it hold.
    """
    template = rng.choice(templates)
    name = template.replace("What's", "What is").replace("I'm", "I am").lower()
    return name, vary(rng, template).format(**fields)
