"""Who asks when, for how much: arrival traces that others published, and generated ones.

Azure's LLM inference trace (Patel et al., "Splitwise", ISCA 2024), Mooncake's with prefix hashes (Qin et
al., FAST 2025), ServeGen's clients (Xiang et al., arXiv 2505.09999), and Poisson or Gamma arrivals. All
give `Arrival`s in order of time; `load`, `capped` and `at_rate` shape them.
"""

from __future__ import annotations

import ast
import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
AZURE = SHARED / "azure-llm-2023-code" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = SHARED / "mooncake-synthetic" / "synthetic_trace.jsonl"
SERVEGEN = SHARED / "servegen-m-small"
MOONCAKE_BLOCK = 512  # tokens of a prefix block with one hash
SERVEGEN_WINDOW, SERVEGEN_LENGTHS = 600.0, 21600  # seconds that a row of rates, a table of lengths stand for


class TraceError(ValueError):
    """A trace file isn't what its format says; names file and line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds since the trace began, lengths in tokens, whose it is, and the hashes of its
    prompt's blocks of `MOONCAKE_BLOCK` tokens where the trace knows them."""

    time: float
    prompt_tokens: int
    output_tokens: int
    client: int = 0
    prefix: tuple[int, ...] = ()


def azure(path: Path = AZURE) -> list[Arrival]:
    """Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise TraceError(f"{path.name} line 1: expected the header TIMESTAMP,ContextTokens,GeneratedTokens")
    found: list[Arrival] = []
    start: datetime | None = None
    for line, row in enumerate(rows[1:], 2):
        try:
            when = datetime.fromisoformat(row[0][:26])
            start = start or when
            found.append(Arrival((when - start).total_seconds(), int(row[1]), int(row[2])))
        except (ValueError, IndexError) as error:
            raise TraceError(f"{path.name} line {line}: {error}") from error
    return found


def mooncake(path: Path = MOONCAKE) -> list[Arrival]:
    """Mooncake's JSONL: timestamp (ms), input_length, output_length, hash_ids."""
    found = []
    for line, text in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(text)
            lengths = int(row["input_length"]), int(row["output_length"])
            found.append(Arrival(row["timestamp"] / 1e3, *lengths, prefix=tuple(row["hash_ids"])))
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{path.name} line {line}: {error!r}") from error
    return sorted(found, key=lambda a: a.time)


def servegen(
    folder: Path = SERVEGEN, *, begin: float = 0.0, seconds: float = 86400.0, seed: int = 0
) -> list[Arrival]:
    """ServeGen's clients from `begin` on: a window's rate, family and parameters of its gaps, its lengths."""
    found: list[Arrival] = []
    for trace in sorted(folder.glob("chunk-*-trace.csv")):
        client = int(trace.name.split("-")[1])
        draw = random.Random(f"{seed}/{client}")
        lengths = _servegen_lengths(trace.with_name(f"chunk-{client}-dataset.json"))
        with trace.open(newline="") as file:
            windows = list(csv.reader(file))
        for line, row in enumerate(windows, 1):
            if len(row) != 6:
                raise TraceError(f"{trace.name} line {line}: {len(row)} fields, expected 6")
            start = float(row[0])
            if start + SERVEGEN_WINDOW <= begin or start >= begin + seconds or not row[3]:
                continue
            gap = _gap(row[3], float(row[4]), float(row[5]), draw)
            prompt, output = lengths[int(start) // SERVEGEN_LENGTHS * SERVEGEN_LENGTHS]
            time = start + gap()
            while time < start + SERVEGEN_WINDOW:
                if begin <= time < begin + seconds:
                    found.append(Arrival(time - begin, prompt(draw), output(draw), client))
                time += gap()
    if not found:
        raise TraceError(f"{folder}: no client has arrivals there")
    return sorted(found, key=lambda a: a.time)


def generated(
    rate: float, seconds: float, *, prompt: int, output: int, cv: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """Gamma arrivals, `rate` a second with gaps of coefficient of variation `cv` (1: Poisson); lengths
    uniform from half to one and a half of `prompt` and `output`."""
    draw = random.Random(f"generated/{seed}")
    shape = 1.0 / cv**2
    found, time = [], 0.0
    while (time := time + draw.gammavariate(shape, 1.0 / (rate * shape))) < seconds:
        lengths = (max(1, round(draw.uniform(0.5, 1.5) * mean)) for mean in (prompt, output))
        found.append(Arrival(time, *lengths))
    return found


def capped(arrivals: Sequence[Arrival], prompt: int, output: int) -> list[Arrival]:
    """No length over `prompt`, `output`; none under 1. Prefix hashes follow."""
    return [
        replace(
            a,
            prompt_tokens=max(1, min(a.prompt_tokens, prompt)),
            output_tokens=max(1, min(a.output_tokens, output)),
            prefix=a.prefix[: -(-min(a.prompt_tokens, prompt) // MOONCAKE_BLOCK)],
        )
        for a in arrivals
    ]


def at_rate(arrivals: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """The trace's first `rate` times `seconds` requests over so many seconds, its bursts kept: time is
    stretched. A trace that is too short is repeated."""
    if not arrivals:
        raise TraceError("the trace is empty")
    wanted = max(1, round(rate * seconds))
    span = arrivals[-1].time * len(arrivals) / max(1, len(arrivals) - 1) or 1.0
    rounds = range(-(-wanted // len(arrivals)))
    found = [replace(a, time=a.time + index * span) for index in rounds for a in arrivals][:wanted]
    stretch = seconds * wanted / (wanted + 1) / (found[-1].time or 1.0)
    return [replace(a, time=a.time * stretch) for a in found]


def load(name: str, seconds: float, seed: int = 0) -> list[Arrival]:
    """A trace by name: azure, mooncake, servegen, poisson or bursty. Where the published files are absent,
    the first three are refused by name."""
    if name in ("poisson", "bursty"):
        cv = 1.0 if name == "poisson" else 3.0
        return generated(1.0, seconds, prompt=256, output=64, cv=cv, seed=seed)
    sources: dict[str, tuple[Path, Callable[[], list[Arrival]]]] = {
        "azure": (AZURE, azure),
        "mooncake": (MOONCAKE, mooncake),
        "servegen": (SERVEGEN, lambda: servegen(seconds=seconds, seed=seed)),
    }
    if name not in sources:
        raise TraceError(f"trace {name!r}: there are {', '.join([*sources, 'poisson', 'bursty'])}")
    path, read = sources[name]
    if not path.exists():
        raise TraceError(f"trace {name!r}: {path} is absent; poisson and bursty are generated")
    return read()


def _gap(family: str, first: float, second: float, draw: random.Random) -> Callable[[], float]:
    if family == "Gamma":
        return lambda: draw.gammavariate(first, second)
    if family == "Weibull":
        return lambda: draw.weibullvariate(second, first)
    raise TraceError(f"arrival family {family!r}: there are Gamma and Weibull")


def _servegen_lengths(path: Path) -> dict[int, tuple[Callable[[random.Random], int], ...]]:
    tables = json.loads(path.read_text())
    return {
        int(window): tuple(_sampler(table[name]) for name in ("input_tokens", "output_tokens"))
        for window, table in tables.items()
    }


def _sampler(text: str) -> Callable[[random.Random], int]:
    """Lengths by their probabilities, from a literal {length: probability}."""
    table: dict[int, float] = ast.literal_eval(text)
    lengths, weights = list(table), list(table.values())
    pending: Iterator[int] = iter(())

    def sample(draw: random.Random) -> int:
        nonlocal pending
        value = next(pending, None)
        if value is None:
            pending = iter(draw.choices(lengths, weights, k=256))
            value = next(pending)
        return max(1, value)

    return sample
