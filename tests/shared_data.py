"""Public data sets for tests, where the shared data folder lies beside the checkout; rows made on the spot in
the same format where it doesn't. `stood_in` counts how often that was."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from typing import Any

from tests.tokenizers import SHARED

stood_in: list[str] = []


def _text(name: str) -> str | None:
    path = SHARED / name
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stood_in.append(name)
    return None


def _json(name: str, stand_in: Callable[[], Any]) -> Any:
    text = _text(name)
    return stand_in() if text is None else json.loads(text)


def _jsonl(name: str, stand_in: Callable[[], list[Any]]) -> list[Any]:
    text = _text(name)
    return stand_in() if text is None else [json.loads(line) for line in text.splitlines()]


def gsm8k() -> list[dict[str, str]]:
    """Rows of `question`, `answer`."""
    return _jsonl(
        "chat/gsm8k/train.jsonl",
        lambda: [
            {"question": f"{n} and {n}?", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"} for n in range(9)
        ],
    )


def conversations(name: str) -> list[dict[str, Any]]:
    """Rows of `messages`: "openai-toy-chat/toy_chat_fine_tuning", "tinker-conversations/conversations"."""

    def made() -> list[dict[str, Any]]:
        said = [("system", "Be brief."), ("user", "Hi!\n"), ("assistant", "你好 👩‍🚀")]
        return [
            {"messages": [{"role": role, "content": text * n} for role, text in said]} for n in range(1, 6)
        ]

    return _jsonl(f"chat/{name}.jsonl", made)


def glaive() -> list[dict[str, Any]]:
    """Rows of `conversations` of (`from` human, gpt, function_call, observation; `value`) and `tools`."""
    turns = [
        ("human", "Rain?"),
        ("function_call", '{"name": "rain", "arguments": {"in": "Oslo"}}'),
        ("observation", '{"rain": true}'),
        ("gpt", "Yes."),
    ]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "tools": json.dumps([{"name": "rain", "parameters": {"type": "object"}}]),
    }
    return _json("chat/glaive-toolcall-demo/glaive_toolcall_en_demo.json", lambda: [row] * 3)


def bfcl() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(question, its answer)."""
    question = {
        "id": "q",
        "question": [[{"role": "user", "content": "5!?"}]],
        "function": [{"name": "math.factorial", "parameters": {"type": "dict"}}],
    }
    answer = {"id": "q", "ground_truth": [{"math.factorial": {"n": [5]}}]}
    folder, file = "function-calling/bfcl-v4/", "BFCL_v4_simple_python.jsonl"
    questions = _jsonl(folder + file, lambda: [question] * 3)
    answers = _jsonl(f"{folder}possible_answer/{file}", lambda: [answer] * 3)
    return list(zip(questions, answers, strict=True))


def preferences() -> list[dict[str, Any]]:
    """Rows of `conversations`, `chosen`, `rejected`."""

    def said(who: str, text: str) -> dict[str, str]:
        return {"from": who, "value": text}

    row = {
        "conversations": [said("system", "Be kind."), said("human", "Hi")],
        "chosen": said("gpt", "Hello!"),
        "rejected": said("gpt", "What?"),
    }
    return _json("preference/dpo-en-demo/dpo_en_demo.json", lambda: [row] * 3)


def seed_tasks() -> list[dict[str, Any]]:
    """Rows of `instruction` and `instances` of (`input`, `output`)."""
    row = {
        "instruction": "Add.",
        "instances": [{"input": "", "output": "None."}, {"input": "1 1", "output": "2"}],
    }
    return _jsonl("instruct/self-instruct-seed/seed_tasks.jsonl", lambda: [row] * 3)


def sql() -> list[dict[str, str]]:
    """Rows of `question`, `query` and more; fields hold line breaks."""
    text = _text("sql/defog-sql-eval/questions_gen_postgres.csv")
    if text is None:
        text = 'question,query\n"How\nmany?","SELECT count(*)\nFROM t;"\n'
    return list(csv.DictReader(text.splitlines(keepends=True)))


def shakespeare() -> str:
    """A long text."""
    return (
        _text("text/tinyshakespeare/input.txt") or "First Citizen:\nSpeak, speak.\n\nAll:\nResolved.\n" * 300
    )


def openai_rows() -> dict[str, dict[str, Any]]:
    """OpenAI's own example of each kind of row, by the name of its schema."""

    def made() -> dict[str, Any]:
        user, call = {"role": "user", "content": "Hi"}, {"function": {"name": "f", "arguments": "{}"}}
        answers = [[{"role": "assistant", "content": text}] for text in ("70", "21")]
        rows = {
            "FineTuneChatRequestInput": {
                "messages": [user, {"role": "assistant", "tool_calls": [call]}],
                "parallel_tool_calls": False,
            },
            "FineTuneCompletionRequestInput": {"prompt": "2+2", "completion": "4"},
            "FineTunePreferenceRequestInput": {
                "input": {"messages": [user]},
                "preferred_completion": answers[0],
                "non_preferred_completion": answers[1],
            },
        }
        return {"x-row-examples": {name: json.dumps(row) for name, row in rows.items()}}

    found = _json("openai-openapi/finetune-row-schemas.json", made)["x-row-examples"]
    return {name: json.loads(text) for name, text in found.items()}
