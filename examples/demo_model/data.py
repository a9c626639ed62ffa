"""Seeded stream of training conversations and the fixed set of held-out questions."""

from __future__ import annotations

import random
from collections.abc import Iterator

from examples.demo_model import tasks_extract, tasks_facts, tasks_memory, tasks_numbers, tasks_words
from examples.demo_model.core import Generator, Question, draw
from examples.demo_model.render import Conversation
from examples.demo_model.styles import STYLES, draw_style, generic_system
from examples.demo_model.tasks_tools import Message, Tool, ToolUse, make_tools, use_tool

# Task -> (generator, share of the training questions). Hard tasks get more.
TASKS: dict[str, tuple[Generator, float]] = {
    "sums": (tasks_numbers.sums, 9.0),
    "differences": (tasks_numbers.differences, 9.0),
    "products": (tasks_numbers.products, 3.0),
    "compare": (tasks_numbers.compare, 10.0),
    "largest_smallest": (tasks_numbers.extreme, 3.0),
    "sort_numbers": (tasks_numbers.sort_numbers, 6.0),
    "count_range": (tasks_numbers.count_range, 2.5),
    "number_facts": (tasks_numbers.number_facts, 4.0),
    "units": (tasks_numbers.units, 3.0),
    "spell": (tasks_words.spell, 5.0),
    "count_letters": (tasks_words.count_letters, 3.0),
    "count_one_letter": (tasks_words.count_letter, 5.0),
    "count_items": (tasks_words.count_items, 2.0),
    "count_words": (tasks_words.count_words, 1.5),
    "reverse": (tasks_words.reverse, 2.5),
    "first_last_letter": (tasks_words.edge_letter, 1.5),
    "letter_case": (tasks_words.letter_case, 4.0),
    "repeat": (tasks_words.repeat, 3.0),
    "sort_words": (tasks_words.sort_words, 4.0),
    "list_item": (tasks_words.list_item, 1.0),
    "dates": (tasks_facts.dates, 4.0),
    "opposites": (tasks_facts.opposites, 2.5),
    "identity": (tasks_facts.identity, 4.5),
    "unknown": (tasks_facts.unknown, 3.0),
    "extract_json": (tasks_extract.extract, 6.0),
}
_NAMES = list(TASKS)
_SHARES = [share for _, share in TASKS.values()]
TOOL_SHARE = 0.17
LONG_SHARE = 0.02
MEMORY_SHARE = 0.25


def question(rng: random.Random, held_out: bool = False) -> Question:
    """Draw one question of a random task."""
    return draw(TASKS[rng.choices(_NAMES, _SHARES)[0]][0], rng, held_out)


def _turns(rng: random.Random) -> int:
    if rng.random() < LONG_SHARE:
        return rng.randint(25, 45)
    return rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 10))


def _personal(rng: random.Random, told: dict[str, str], held_out: bool) -> Question:
    """The user tells something about himself (remembered in ``told``) or asks for it."""
    kind = rng.choice(list(told)) if told and rng.random() < 0.5 else rng.choice(list(tasks_memory.FACTS))
    if rng.random() < 0.5:
        return tasks_memory.recall(rng, kind, told.get(kind))
    told[kind], asked = tasks_memory.tell(rng, kind, held_out)
    return asked


def _chat(rng: random.Random) -> Conversation:
    style = draw_style(rng)
    messages: list[Message] = [{"role": "system", "content": style.system}] if style.system else []
    focus = rng.choices(_NAMES, _SHARES)[0] if rng.random() < 0.2 else None
    told: dict[str, str] = {}
    personal = rng.random() < MEMORY_SHARE
    for _ in range(_turns(rng)):
        if personal and rng.random() < 0.4:
            asked = _personal(rng, told, False)
        elif style.system and rng.random() < 0.1:
            asked = draw(lambda r: tasks_facts.identity(r, tasks_facts.IDENTITY_KINDS), rng, False)
        else:
            asked = draw(TASKS[focus][0], rng, False) if focus else question(rng)
        messages += [
            {"role": "user", "content": asked.user},
            {"role": "assistant", "content": style.apply(asked)},
        ]
    return Conversation(messages)


def tool_messages(use: ToolUse, answered: bool = True) -> list[Message]:
    """Messages of one tool use: request, call and, if ``answered``, the result and the final answer."""
    messages: list[Message] = [
        {"role": "user", "content": use.user},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": use.call}]},
    ]
    if answered:
        messages += [{"role": "tool", "content": use.response}, {"role": "assistant", "content": use.answer}]
    return messages


# With these tools in the system block, plain questions of these tasks would call for the tool.
_CLASHES = {
    "sums": ("add", "calculator"),
    "differences": ("calculator",),
    "products": ("multiply", "calculator"),
    "unknown": ("search",),
}
# Words in an unanswerable question that would call for the tool.
_CLASH_WORDS = {
    "get_weather": ("weather", "rain"),
    "get_time": ("time is", "day is", "date"),
    "get_date": ("time is", "day is", "date"),
    "translate": ("translate", "say"),
    "get_stock_price": ("price", "cost"),
    "find_product": ("price", "cost", "buy"),
    "get_population": ("population", "people live"),
    "calculator": ("square root",),
}


def _clashes(asked: Question, kinds: set[str]) -> bool:
    if kinds.intersection(_CLASHES.get(asked.task, ())):
        return True
    words = [word for kind in kinds for word in _CLASH_WORDS.get(kind, ())]
    return asked.task == "unknown" and any(word in asked.user.lower() for word in words)


def plain_with_tools(rng: random.Random, tools: list[Tool], held_out: bool) -> Question:
    """A question that none of ``tools`` fits."""
    kinds = {tool.kind.names[0] for tool in tools}
    while True:
        asked = draw(tasks_facts.unknown, rng, held_out) if rng.random() < 0.15 else question(rng, held_out)
        if not _clashes(asked, kinds):
            return asked
        if asked.task == "unknown":
            return draw(tasks_facts.identity, rng, held_out)


def _tool_chat(rng: random.Random) -> Conversation:
    tools = make_tools(rng)
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": generic_system(rng)})
    for _ in range(rng.choice((1, 2, 2, 3, 4, 5))):
        if rng.random() < 0.72:
            messages += tool_messages(use_tool(rng, rng.choice(tools), False))
        else:
            asked = plain_with_tools(rng, tools, False)
            messages += _pair(asked)
    return Conversation(messages, [tool.schema for tool in tools])


def conversations(seed: int) -> Iterator[Conversation]:
    """Endless training conversations; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield _tool_chat(rng) if rng.random() < TOOL_SHARE else _chat(rng)


def _pair(asked: Question) -> list[Message]:
    return [{"role": "user", "content": asked.user}, {"role": "assistant", "content": asked.answer}]


def _held_out_chats(rng: random.Random, count: int) -> Iterator[tuple[str, Conversation]]:
    """A question after 2 to 11 others, and a personal fact asked for after up to five others."""
    for _ in range(count):
        mixed = [question(rng, True) for _ in range(rng.randint(3, 12))]
        yield "multi_turn", Conversation([m for asked in mixed for m in _pair(asked)])
        kind = rng.choice(list(tasks_memory.FACTS))
        value, told = tasks_memory.tell(rng, kind, True)
        chat = [
            told,
            *(question(rng, True) for _ in range(rng.randint(0, 5))),
            tasks_memory.recall(rng, kind, value),
        ]
        yield "memory", Conversation([m for asked in chat for m in _pair(asked)])


def _held_out_tools(rng: random.Random, count: int) -> Iterator[tuple[str, Conversation]]:
    for _ in range(count):
        tools = make_tools(rng)
        schemas = [tool.schema for tool in tools]
        use = use_tool(rng, rng.choice(tools), True)
        yield "tool_call", Conversation(tool_messages(use, answered=False), schemas)
        yield "tool_answer", Conversation(tool_messages(use), schemas)
        asked = plain_with_tools(rng, tools, True)
        yield "tool_not_needed", Conversation(_pair(asked), schemas)


def held_out(seed: int, per_task: int) -> Iterator[tuple[str, Conversation]]:
    """Held-out ``(task, conversation)`` pairs; the last message is the expected answer.

    Every task appears ``per_task`` times alone, then come questions inside multi-turn chats
    (``multi_turn``), under each system style (``system_*``) and with tools (``tool_*``).
    """
    rng = random.Random(seed)
    for name, (generator, _) in TASKS.items():
        for _ in range(per_task):
            asked = draw(generator, rng, True)
            yield name, Conversation(_pair(asked))
    yield from _held_out_chats(rng, per_task)
    for name, make in (*STYLES.items(), ("ignored", None)):
        for _ in range(per_task):
            style = make(rng) if make else None
            if name == "persona":
                asked = draw(lambda r: tasks_facts.identity(r, tasks_facts.IDENTITY_KINDS), rng, True)
            else:
                asked = question(rng, True)
            answer = style.apply(asked) if style else asked.answer
            system = style.system if style else generic_system(rng)
            yield (
                f"system_{name}",
                Conversation(
                    [
                        {"role": "system", "content": system},
                        {"role": "user", "content": asked.user},
                        {"role": "assistant", "content": answer},
                    ]
                ),
            )
    yield from _held_out_tools(rng, per_task)
