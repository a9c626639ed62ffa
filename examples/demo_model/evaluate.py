"""Exact match on held-out questions: ``python -m examples.demo_model.evaluate [--model DIR]``."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, PreTrainedModel, Qwen3ForCausalLM

from examples.demo_model.data import held_out
from examples.demo_model.render import segments

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "coserve" / "assets" / "demo_model"
SEED = 2024
_ROWS = 64


@dataclass
class Answered:
    """One held-out question with the expected and the produced answer."""

    task: str
    prompt: str
    expected: str
    produced: str

    @property
    def right(self) -> bool:
        """Whether the produced text is exactly the expected one."""
        return self.produced == self.expected


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: list[list[int]], limit: int, end: int) -> list[list[int]]:
    """Greedy continuations of token prompts, left-padded to one batch, up to ``limit`` tokens or ``end``."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    out: list[list[int]] = [[] for _ in prompts]
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        step = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = step.logits[:, -1].argmax(-1, keepdim=True)
        alive &= tokens[:, 0] != end
        if not alive.any():
            break
        for row in alive.nonzero().flatten().tolist():
            out[row].append(int(tokens[row, 0]))
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
        positions = positions[:, -1:] + 1
    return out


def answer_all(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: list[tuple[str, str, str]]
) -> list[Answered]:
    """Answer ``(task, prompt, expected)`` triples in batches of similar prompt and answer length."""
    end = tokenizer.token_to_id("<|im_end|>")
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for _, prompt, _ in questions]
    limits = [len(tokenizer.encode(wanted, add_special_tokens=False).ids) + 1 for _, _, wanted in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(prompts[i]) // 32, limits[i]))
    answered: list[Answered | None] = [None] * len(questions)
    for start in range(0, len(order), _ROWS):
        chunk = order[start : start + _ROWS]
        produced = greedy(model, [prompts[i] for i in chunk], max(limits[i] for i in chunk), end)
        for index, ids in zip(chunk, produced, strict=True):
            answered[index] = Answered(*questions[index], tokenizer.decode(ids, skip_special_tokens=False))
    return [a for a in answered if a is not None]


def questions_of(seed: int, per_task: int) -> list[tuple[str, str, str]]:
    """Held-out ``(task, prompt text, expected answer text)`` triples."""
    triples = []
    for task, conversation in held_out(seed, per_task):
        *before, (expected, _) = segments(conversation)
        triples.append((task, "".join(text for text, _ in before), expected.removesuffix("<|im_end|>")))
    return triples


def evaluate_model(
    model: PreTrainedModel, tokenizer: Tokenizer, per_task: int, seed: int = SEED
) -> list[Answered]:
    """Answer ``per_task`` held-out questions of every task by greedy decoding."""
    was_training = model.training
    model.eval()
    answered = answer_all(model, tokenizer, questions_of(seed, per_task))
    model.train(was_training)
    return answered


def format_table(answered: list[Answered]) -> str:
    """A Markdown table of exact matches per task and in total."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for answer in answered:
        rows[answer.task].append(answer.right)
    lines = ["| task | right | asked | exact match |", "| --- | ---: | ---: | ---: |"]
    for task, marks in [*rows.items(), ("total", [a.right for a in answered])]:
        lines.append(f"| {task} | {sum(marks)} | {len(marks)} | {100 * sum(marks) / len(marks):.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--per-task", type=int, default=30)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Qwen3ForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    answered = evaluate_model(model, tokenizer, args.per_task, args.seed)
    if args.show_wrong:
        for wrong in (a for a in answered if not a.right):
            print(f"[{wrong.task}] {wrong.prompt[-300:]!r}")
            print(f"  expected {wrong.expected!r}\n  produced {wrong.produced!r}")
    print(format_table(answered))


if __name__ == "__main__":
    main()
