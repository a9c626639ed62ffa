"""Load for a server that speaks OpenAI's API: completions of fixed lengths, and the rate they came at.

Prompts are random token ids and `ignore_eos` is set, so both servers owe the same tokens. The client
shares the machine's cores with the server it measures; threads over http.client cost little, and so do
whole answers (not streams) where only throughput counts.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from threading import Barrier
from typing import Any

TIMEOUT = 600.0  # seconds without a byte until a request counts as failed


@dataclass(frozen=True)
class Load:
    """`requests` completions of `prompt_tokens` -> `output_tokens`, `concurrency` of them at any time."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens} in, {self.output_tokens} out, {self.concurrency} at a time"

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        """One prompt of random ids a request."""
        draw = random.Random(seed)
        return [random_prompt(draw, self.prompt_tokens, vocab) for _ in range(self.requests)]


def random_prompt(draw: random.Random, tokens: int, vocab: int) -> list[int]:
    """Ids without those under 300, which are bytes and control tokens, and the last 300, among them the made
    tokenizer's special ones."""
    return [draw.randrange(300, vocab - 300) for _ in range(tokens)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def completion(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Post one completion; raises RuntimeError with the server's words when it is refused."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
    return response


def request_body(model: str, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of exactly `tokens`."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        **more,
    }


def closed_loop(port: int, models: Sequence[str], load: Load, vocab: int, seed: int = 0) -> float:
    """Generated tokens/s from the first request sent to the last one answered; `models` take turns."""
    work = list(zip(load.prompts(vocab, seed), cycle(models), strict=False))

    def one(job: tuple[list[int], str]) -> int:
        prompt, model = job
        with completion(port, request_body(model, prompt, load.output_tokens)) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    began = time.perf_counter()
    with ThreadPoolExecutor(load.concurrency) as pool:
        generated = sum(pool.map(one, work))
    seconds = time.perf_counter() - began
    if generated != load.requests * load.output_tokens:
        raise RuntimeError(f"{generated} tokens came of {load.requests * load.output_tokens}")
    return generated / seconds


def chunk_times(response: http.client.HTTPResponse) -> Iterator[float]:
    """The time at which each chunk with text arrived."""
    for line in response:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
            yield time.perf_counter()


def decode_rate(port: int, model: str, load: Load, vocab: int, seed: int = 0) -> float:
    """Tokens/s of `load.concurrency` streams that decode together, from the last one's first token on."""
    together = Barrier(load.concurrency)

    def one(prompt: list[int]) -> list[float]:
        together.wait()
        with completion(port, request_body(model, prompt, load.output_tokens, stream=True)) as response:
            return list(chunk_times(response))

    with ThreadPoolExecutor(load.concurrency) as pool:
        streams = list(pool.map(one, load.prompts(vocab, seed)[: load.concurrency]))
    began, ended = max(s[0] for s in streams), max(s[-1] for s in streams)
    # A chunk may hold two tokens where the server falls behind, so what is left is not counted in chunks.
    left = sum(load.output_tokens - sum(t <= began for t in s) for s in streams)
    return left / (ended - began)
