"""Public data sets, brought into each kind of rows: none is refused, and the answers are what is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from coserve.tokenizer import Tokenizer
from coserve.training.data_file import DataFile, FileRow
from coserve.training.rows import Kind, kind_of
from tests import shared_data
from tests import tokenizers as made
from tests.training.data_rows import lines, trained_text

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return made.shared("qwen2.5") or made.byte_level()


def read(rows: Sequence[Any], tokenizer: Tokenizer, method: str, max_length: int = 0) -> list[FileRow]:
    """Every row, none of them refused or dropped; the counts agree with them."""
    file = DataFile(lines(*rows), tokenizer, max_length, method)
    found = list(file.rows())
    counts = file.counts
    assert counts.rows == counts.examples == len(found) == len(rows) and not counts.dropped
    examples = [example for row in found for example in row.examples]
    assert counts.tokens == sum(len(example.token_ids) for example in examples)
    return found


def check_answers(row: FileRow, answers: list[str], tokenizer: Tokenizer) -> None:
    """The trained runs are the answers, each with its end token, but for white space at their ends."""
    (example,) = row.examples
    end = tokenizer.token_text(tokenizer.eos_token_ids[0])
    got = [text.removesuffix(end).strip() for text in trained_text(example, tokenizer)]
    assert got == [answer.strip() for answer in answers]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_gsm8k_as_chat_and_as_completion(tokenizer: Tokenizer) -> None:
    source = shared_data.gsm8k()[:150]
    chats = [{"messages": [user(row["question"]), assistant(row["answer"])]} for row in source]
    for row, original in zip(read(chats, tokenizer, "supervised"), source, strict=True):
        check_answers(row, [original["answer"]], tokenizer)
    plain = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in source]
    for row, original in zip(read(plain, tokenizer, "dft"), source, strict=True):
        check_answers(row, [original["answer"]], tokenizer)


@pytest.mark.parametrize(
    "name", ["openai-toy-chat/toy_chat_fine_tuning", "tinker-conversations/conversations"]
)
def test_conversations(name: str, tokenizer: Tokenizer) -> None:
    rows = shared_data.conversations(name)
    for row, original in zip(read(rows, tokenizer, "supervised"), rows, strict=True):
        messages = original["messages"]
        check_answers(row, [m["content"] for m in messages if m["role"] == "assistant"], tokenizer)
        assert row.examples[0].token_ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
    longest = max(len(row.examples[0].token_ids) for row in read(rows, tokenizer, "supervised"))
    file = DataFile(lines(*rows), tokenizer, longest - 1)
    assert len(list(file)) == len(rows) and file.counts.truncated >= 1 == file.counts.cut_tokens


def test_glaive_s_tool_calls(tokenizer: Tokenizer) -> None:
    def message(turn: dict[str, str]) -> dict[str, Any]:
        if turn["from"] != "function_call":
            return {"role": ROLES[turn["from"]], "content": turn["value"]}
        call = json.loads(turn["value"])
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}

    source = shared_data.glaive()[:120]
    rows = [
        {
            "messages": [message(turn) for turn in row["conversations"]],
            "tools": [{"type": "function", "function": f} for f in json.loads(row["tools"] or "[]")],
            "parallel_tool_calls": False,
        }
        for row in source
    ]
    for row, original in zip(read(rows, tokenizer, "supervised"), source, strict=True):
        said = [turn for turn in original["conversations"] if turn["from"] in ("gpt", "function_call")]
        runs = trained_text(row.examples[0], tokenizer)
        assert len(runs) == len(said)
        for run, turn in zip(runs, said, strict=True):
            if turn["from"] == "gpt":
                assert turn["value"].strip() in run
            elif tokenizer.token_id("<|im_end|>") is not None:
                assert json.loads(turn["value"])["name"] in run and "<tool_call>" in run


def test_bfcl_s_functions(tokenizer: Tokenizer) -> None:
    rows = []
    for question, answer in shared_data.bfcl()[:100]:
        ((name, values),) = answer["ground_truth"][0].items()
        arguments = json.dumps({key: choices[0] for key, choices in values.items()})
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        rows.append(
            {
                "messages": [*question["question"][0], {"role": "assistant", "tool_calls": [call]}],
                "tools": [{"type": "function", "function": f} for f in question["function"]],
            }
        )
    found = read(rows, tokenizer, "supervised")
    assert all(len(trained_text(row.examples[0], tokenizer)) == 1 for row in found)


def test_preferences_in_every_form(tokenizer: Tokenizer) -> None:
    def message(turn: dict[str, str]) -> dict[str, str]:
        return {"role": ROLES[turn["from"]], "content": turn["value"]}

    forms: dict[str, list[Any]] = {"openai": [], "trl": [], "implicit": []}
    source = shared_data.preferences()[:80]
    for row in source:
        prompt = [message(turn) for turn in row["conversations"]]
        chosen, rejected = [message(row["chosen"])], [message(row["rejected"])]
        openai = {"preferred_output": chosen, "non_preferred_output": rejected}
        forms["openai"].append({"input": {"messages": prompt}, **openai})
        forms["trl"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        forms["implicit"].append({"chosen": prompt + chosen, "rejected": prompt + rejected})
    found = [read(rows, tokenizer, "dpo") for rows in forms.values()]
    assert found[0] == found[1] == found[2]
    for pair, row in zip(found[0], source, strict=True):
        for example, answer in zip(pair.examples, (row["chosen"], row["rejected"]), strict=True):
            (run,) = trained_text(example, tokenizer)
            assert run.strip().startswith(answer["value"].strip()[:40])
    limit = sorted(len(example.token_ids) for pair in found[0] for example in pair.examples)[len(source)]
    file = DataFile(lines(*forms["trl"]), tokenizer, limit, "dpo")
    kept = [row for row in file.rows() if not row.dropped]
    whole = {pair.line: pair for pair in found[0]}
    for pair in kept:
        for cut, full in zip(pair.examples, whole[pair.line].examples, strict=True):
            assert cut.token_ids == full.token_ids[:limit] and any(label != -100 for label in cut.labels)
    assert file.counts.examples + sum(file.counts.dropped.values()) == len(source)


def test_seed_tasks_and_sql_as_completions(tokenizer: Tokenizer) -> None:
    tasks = [
        (f"{task['instruction']}\n\n{instance['input']}\n\n", instance["output"])
        for task in shared_data.seed_tasks()
        for instance in task["instances"]
    ]
    queries = [(f"{row['question']}\n", row["query"]) for row in shared_data.sql()]
    pairs = [*tasks[:150], *queries]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for row, (_, completion) in zip(read(rows, tokenizer, "supervised"), pairs, strict=True):
        check_answers(row, [completion], tokenizer)


def test_a_long_text_as_text_and_as_ids(tokenizer: Tokenizer) -> None:
    text = shared_data.shakespeare()[:60_000]
    places = [*range(0, len(text), 2_000), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    as_text = read([{"text": piece} for piece in pieces], tokenizer, "supervised")
    assert all(row.examples[0].labels == row.examples[0].token_ids for row in as_text)
    as_ids = read([{"input_ids": row.examples[0].token_ids} for row in as_text], tokenizer, "supervised")
    assert [row.examples[0].labels for row in as_ids] == [row.examples[0].labels for row in as_text]
    end = [tokenizer.eos_id]
    decoded = [tokenizer.decode(row.examples[0].token_ids[:-1]) for row in as_ids]
    assert decoded == pieces and all(row.examples[0].token_ids[-1:] == end for row in as_ids)


def test_openai_s_own_examples(tokenizer: Tokenizer) -> None:
    rows = shared_data.openai_rows()
    kinds = {name: kind_of(row) for name, row in rows.items()}
    assert set(kinds.values()) == {Kind.CHAT, Kind.COMPLETION, Kind.PREFERENCE}
    for name, row in rows.items():
        method = "dpo" if kinds[name] is Kind.PREFERENCE else "supervised"
        (found,) = read([row], tokenizer, method)
        assert len(found.examples) == (2 if method == "dpo" else 1)


def test_what_is_missing_is_stood_in_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(shared_data, "SHARED", tmp_path)
    monkeypatch.setattr(shared_data, "stood_in", [])
    loaders = (
        shared_data.gsm8k,
        shared_data.glaive,
        shared_data.bfcl,
        shared_data.preferences,
        shared_data.seed_tasks,
        shared_data.sql,
        shared_data.shakespeare,
        shared_data.openai_rows,
    )
    assert all(load() for load in loaders) and shared_data.conversations("x")
    assert len(shared_data.stood_in) == len(loaders) + 2
