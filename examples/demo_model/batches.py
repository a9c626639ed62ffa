"""Turning the conversation stream into padded, length-sorted token batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from examples.demo_model.data import conversations
from examples.demo_model.render import segments

CONTEXT = 2048
_POOL = 1500
_ROUND = 32


@dataclass
class Batch:
    """``tokens`` (rows, length) right-padded with 0; ``source``/``target`` list the predicted places.

    ``source`` are flat indices into ``tokens`` whose next token is ``target``; only assistant tokens count.
    """

    tokens: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


def _encode_pool(tokenizer: Tokenizer, stream: Iterator, count: int) -> list[tuple[list[int], list[bool]]]:
    split = [segments(c) for c in itertools.islice(stream, count)]
    flat = [text for pieces in split for text, _ in pieces]
    encoded = iter(tokenizer.encode_batch(flat, add_special_tokens=False))
    rows = []
    for pieces in split:
        ids: list[int] = []
        wanted: list[bool] = []
        for _, is_target in pieces:
            part = next(encoded).ids
            ids += part
            wanted += [is_target] * len(part)
        rows.append((ids[:CONTEXT], wanted[:CONTEXT]))
    return rows


def _to_batch(rows: list[tuple[list[int], list[bool]]]) -> Batch:
    length = -(-max(len(ids) for ids, _ in rows) // _ROUND) * _ROUND
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    for row, (ids, wanted) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        for place in range(1, len(ids)):
            if wanted[place]:
                source.append(row * length + place - 1)
                target.append(ids[place])
    return Batch(tokens, torch.tensor(source), torch.tensor(target))


def batches(tokenizer: Tokenizer, seed: int, batch_tokens: int) -> Iterator[Batch]:
    """Endless batches of about ``batch_tokens`` tokens; one conversation per row, rows of similar length.

    Every row starts at position 0 and sees only itself, as when serving.
    """
    stream = conversations(seed)
    rng = random.Random(seed)
    while True:
        rows = sorted(_encode_pool(tokenizer, stream, _POOL), key=lambda row: len(row[0]))
        ready: list[list[tuple[list[int], list[bool]]]] = [[]]
        for row in rows:
            length = -(-len(row[0]) // _ROUND) * _ROUND
            if ready[-1] and length * (len(ready[-1]) + 1) > batch_tokens:
                ready.append([])
            ready[-1].append(row)
        rng.shuffle(ready)
        yield from map(_to_batch, ready)
