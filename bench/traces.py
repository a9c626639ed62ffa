"""Who asks when, for how much: arrival traces that others published, and generated ones.

Azure's LLM inference trace (Patel et al., "Splitwise", ISCA 2024), Mooncake's with prefix hashes (Qin et
al., FAST 2025), ServeGen's clients (Xiang et al., arXiv 2505.09999), and Poisson or Gamma arrivals. All
give `Arrival`s in order of time; `load`, `capped`, `at_rate` and `sampled` shape them.
"""

from __future__ import annotations

import ast
import csv
import json
import math
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
GOLDEN = 0.618  # of a trace, no part of which comes back to where it was for long
SERVEGEN_WINDOW, SERVEGEN_LENGTHS = 600.0, 21600  # seconds that a row of rates, a table of lengths stand for


AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
AZURE_FORMAT = f"a CSV with the header {','.join(AZURE_COLUMNS)}, an ISO time and two counts of tokens a line"
MOONCAKE_FORMAT = (
    "a JSON object a line with timestamp (ms), input_length and output_length (tokens), and hash_ids (a list)"
)
SERVEGEN_FORMAT = (
    "six fields a line: window's start (s), rate, coefficient of variation, Gamma or Weibull (empty: nothing "
    "arrives), its two parameters; and a chunk-N-dataset.json with lengths for each window of 21600 s"
)


class TraceError(ValueError):
    """A trace file is absent or isn't what its format says; names file and line, and what was expected."""


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
    found: list[tuple[datetime, int, int]] = []
    rows = enumerate(csv.reader(_lines(path, AZURE_FORMAT)), 1)
    if (first := next(rows, (1, []))[1]) != AZURE_COLUMNS:
        raise _other(path, 1, AZURE_FORMAT, f"the header is {','.join(first)[:80]!r}")
    for line, row in rows:
        try:
            when, prompt, output = row
            found.append((datetime.fromisoformat(when[:26]), _length(prompt), _length(output)))
        except ValueError as error:
            raise _other(path, line, AZURE_FORMAT, error) from error
    found.sort()
    return [Arrival((when - found[0][0]).total_seconds(), prompt, output) for when, prompt, output in found]


def mooncake(path: Path = MOONCAKE) -> list[Arrival]:
    """Mooncake's JSONL: timestamp (ms), input_length, output_length, hash_ids."""
    found = []
    for line, text in enumerate(_lines(path, MOONCAKE_FORMAT), 1):
        try:
            row = json.loads(text)
            lengths = _length(row["input_length"]), _length(row["output_length"])
            found.append(Arrival(float(row["timestamp"]) / 1e3, *lengths, prefix=tuple(row["hash_ids"])))
        except KeyError as error:
            raise _other(path, line, MOONCAKE_FORMAT, f"{error} is absent") from error
        except (ValueError, TypeError) as error:
            raise _other(path, line, MOONCAKE_FORMAT, error) from error
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
            try:
                start, _, _, family, first, second = row
                window = float(start)
                if window + SERVEGEN_WINDOW <= begin or window >= begin + seconds or not family:
                    continue
                gap = _gap(family, float(first), float(second), draw)
                prompt, output = lengths[int(window) // SERVEGEN_LENGTHS * SERVEGEN_LENGTHS]
            except (ValueError, KeyError) as error:
                raise _other(trace, line, SERVEGEN_FORMAT, error) from error
            time = window + gap()
            while time < window + SERVEGEN_WINDOW:
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


def sampled(
    arrivals: Sequence[Arrival], rate: float, seconds: float, most: float, seed: int = 0
) -> list[Arrival]:
    """`rate` times `seconds` of the trace's requests as a server with fewer users would see them: real time,
    a random part of the requests. Drawn from the trace's first periods of `seconds`, laid over each
    other until they have `most` times `seconds` requests, so a lower rate's requests are among a higher's.

    Stretching time instead would make other bursts of the same trace at each rate.
    """
    if not arrivals:
        raise TraceError("the trace is empty")
    span = arrivals[-1].time * len(arrivals) / max(1, len(arrivals) - 1) or seconds
    pool: list[Arrival] = []
    period = 0
    while len(pool) < most * seconds:
        start = period * min(seconds, GOLDEN * span) % span  # never the same part twice in step
        for around in range(math.ceil((start + seconds) / span)):
            times = ((a, a.time + around * span - start) for a in arrivals)
            pool += [replace(a, time=time) for a, time in times if 0.0 <= time < seconds]
        period += 1
    chosen = random.Random(f"sampled/{seed}").sample(pool, len(pool))[: max(1, round(rate * seconds))]
    return sorted(chosen, key=lambda a: a.time)


def load(name: str, seconds: float, seed: int = 0, prompt: int = 384, output: int = 96) -> list[Arrival]:
    """A trace by name (azure, mooncake, servegen; poisson and bursty are generated, with at most `prompt` and
    `output` tokens) or from a file of Azure's (.csv) or Mooncake's (.jsonl) format. TraceError: absent, or in
    another format."""
    if name in ("poisson", "bursty"):
        cv = 1.0 if name == "poisson" else 3.0
        means = {"prompt": round(prompt / 1.5), "output": round(output / 1.5)}
        return generated(1.0, seconds, cv=cv, seed=seed, **means)
    if name == "servegen":
        if not SERVEGEN.exists():
            raise TraceError(f"trace servegen: {SERVEGEN} is absent; poisson and bursty are generated")
        return servegen(seconds=seconds, seed=seed)
    path = {"azure": AZURE, "mooncake": MOONCAKE}.get(name, Path(name))
    readers: dict[str, Callable[[Path], list[Arrival]]] = {".csv": azure, ".jsonl": mooncake}
    if path.suffix not in readers:
        raise TraceError(
            f"trace {name!r}: there are azure, mooncake, servegen, poisson, bursty, and files that end in "
            f".csv ({AZURE_FORMAT}) or .jsonl ({MOONCAKE_FORMAT})"
        )
    found = readers[path.suffix](path)
    if not found:
        raise TraceError(f"{path}: the trace is empty")
    return found


def _lines(path: Path, form: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}; poisson and bursty are generated") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _other(path, line, form, "not UTF-8 text") from error


def _other(path: Path, line: int, form: str, what: object) -> TraceError:
    return TraceError(f"{path} line {line}: {what}; expected {form}")


def _length(value: object) -> int:
    """Tokens, from a number or its text; ValueError for anything else."""
    tokens = int(value) if isinstance(value, int | str) else -1
    if tokens < 0:
        raise ValueError(f"{value!r} is no count of tokens")
    return tokens


def _gap(family: str, first: float, second: float, draw: random.Random) -> Callable[[], float]:
    if family == "Gamma":
        return lambda: draw.gammavariate(first, second)
    if family == "Weibull":
        return lambda: draw.weibullvariate(second, first)
    raise ValueError(f"arrival family {family!r}")


def _servegen_lengths(path: Path) -> dict[int, tuple[Callable[[random.Random], int], ...]]:
    try:
        return {
            int(window): tuple(_sampler(table[name]) for name in ("input_tokens", "output_tokens"))
            for window, table in json.loads("\n".join(_lines(path, SERVEGEN_FORMAT))).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        if isinstance(error, TraceError):
            raise
        raise _other(path, 1, SERVEGEN_FORMAT, error) from error


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
