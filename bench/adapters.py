"""A thousand adapters behind one server: throughput under Zipf's law beside the base's, hits of its three
tiers, what publishing costs the engine and who notices, memory and start per registered adapter.

A closed loop over HTTP; the adapter of each request is drawn with a probability of 1 / its place to the power
of 1.1. The headline is the throughput once warm beside the base's own, in interleaved rounds. Adapters are
PEFT directories of rank 8 on q and v, each with numbers of its own.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import tempfile
import time
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import common
import torch
from http_load import Load, closed_loop, completion, random_prompt, request_body
from lora import linears
from safetensors.torch import save
from servers import MODEL, Server, proportional_memory, start_coserve

from coserve.lora.registry import AdapterRegistry
from coserve.server import adapter_store

COUNT, QUICK_COUNT = 1000, 40
SWAPS, QUICK_SWAPS = 100, 10
RANK, MODULES, ZIPF = 8, ("q_proj", "v_proj"), 1.1
MAX_LORAS, MAX_CPU_LORAS = 32, 256
LOAD = Load(32, 64, 128, 64)
TIERS = ("device", "host", "disk")


# ------------------------------------------------------------------ adapters


def write_adapters(folder: Path, model: Path, count: int) -> None:
    """PEFT directories a0, a1, ...: the numbers of one, each time begun elsewhere."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (outputs, inputs) in linears(model).items():
        if name.endswith(MODULES):
            a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, RANK, generator=generator) / inputs**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    whole = save(tensors)
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, numbers = whole[:begin], whole[begin:]
    config = json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model),
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": list(MODULES),
        }
    )
    for index in range(count):
        place = folder / f"a{index}"
        place.mkdir(parents=True)
        cut = 2 * (1 + 977 * index) % len(numbers)
        (place / "adapter_model.safetensors").write_bytes(header + numbers[cut:] + numbers[:cut])
        (place / "adapter_config.json").write_text(config)


def post(port: int, path: str, body: dict[str, Any]) -> None:
    """Raises HTTPError where it is refused."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).close()


def register(server: Server, folder: Path, count: int) -> list[float]:
    """Load them all by name and path, four at a time; seconds of each."""

    def one(index: int) -> float:
        began = time.perf_counter()
        body = {"lora_name": f"a{index}", "lora_path": str(folder / f"a{index}")}
        post(server.port, "/v1/load_lora_adapter", body)
        return time.perf_counter() - began

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(count)))


def drawn(count: int, requests: int, seed: int) -> list[str]:
    """A name for each request, by Zipf's law."""
    weights = list(accumulate(place**-ZIPF for place in range(1, count + 1)))
    chosen = random.Random(seed).choices(range(count), cum_weights=weights, k=requests)
    return [f"a{index}" for index in chosen]


# ------------------------------------------------------------------ figures of the server


def metric(server: Server, name: str) -> dict[str, float]:
    """A metric's values by its one label's ("" without labels)."""
    address = f"http://127.0.0.1:{server.port}/metrics"
    text = urllib.request.urlopen(address, timeout=30).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith((name + " ", name + "{")):
            labels, _, value = line.rpartition(" ")
            found[labels.partition('="')[2].removesuffix('"}')] = float(value)
    return found


def settled(server: Server, name: str) -> dict[str, float]:
    """A metric once the engine has told all: it does four times a second while it has work."""
    time.sleep(0.6)
    return metric(server, name)


def zipf_round(server: Server, count: int, load: Load, vocab: int, seed: int, what: str) -> dict[str, Any]:
    """One round by Zipf's law, with the part of its requests that found their adapter in each tier."""
    before = settled(server, "coserve_adapter_found_total")
    rate = closed_loop(server.port, drawn(count, load.requests, seed), load, vocab, seed)
    after = settled(server, "coserve_adapter_found_total")
    found = {tier: after[tier] - before[tier] for tier in TIERS}
    total = sum(found.values())
    row = {"what": what, "coserve": rate, "unit": "tokens/s", "adapters": count}
    row |= {"requests": load.requests, "found_in": {tier: found[tier] / total for tier in TIERS}}
    print(row, file=sys.stderr)
    return row


def registered_bytes(state: Path) -> float:
    """What a registered adapter takes of the server's memory: its database row and the registry's entry."""
    connection = sqlite3.connect(state / "coserve.sqlite")
    connection.row_factory = sqlite3.Row
    tracemalloc.start()
    rows = adapter_store.listed_rows(connection)
    registry, table = AdapterRegistry({MODEL}), {}
    for row in rows:
        table[row.version.name, row.version.version] = row
        registry.publish(row.version)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    connection.close()
    return size / len(registry)


# ------------------------------------------------------------------ publishing under load


def swap_under_load(server: Server, folder: Path, vocab: int, swaps: int, load: Load) -> list[dict[str, Any]]:
    """Versions of one name published one after the other, while requests go on asking for that name, for
    another adapter and for the base."""
    draw, over = random.Random(5), Event()
    failed: list[str] = []
    answered = [0]

    def ask(worker: int) -> None:
        model = ("swapped", "a0", MODEL)[worker % 3]
        while not over.is_set():
            body = request_body(model, random_prompt(draw, load.prompt_tokens, vocab), 16)
            try:
                completion(server.port, body).read()
                answered[0] += 1
            except (OSError, RuntimeError) as error:
                failed.append(str(error))

    def publish(index: int) -> float:
        began = time.perf_counter()
        path = str(folder / f"a{1 + index % (swaps // 2)}")
        body = {"lora_name": "swapped", "lora_path": path, "load_inplace": True}
        post(server.port, "/v1/load_lora_adapter", body)
        return time.perf_counter() - began

    publish(0)
    with ThreadPoolExecutor(load.concurrency) as pool:
        workers = [pool.submit(ask, worker) for worker in range(load.concurrency)]
        try:
            before = settled(server, "coserve_adapter_engine_seconds_total")[""]
            time.sleep(3.0)
            idle = settled(server, "coserve_adapter_engine_seconds_total")[""] - before
            began = time.perf_counter()
            took = [publish(index) for index in range(1, swaps + 1)]
            seconds = time.perf_counter() - began
            spent = settled(server, "coserve_adapter_engine_seconds_total")[""] - before - idle
        finally:
            over.set()
        for worker in workers:
            worker.result()
    spent -= idle * (seconds + 0.6) / 3.6  # looking for something to do costs its part without swaps too
    rows = [
        {"what": "engine time of a publication under load", "coserve": 1e3 * spent / swaps, "unit": "ms"},
        {"what": "failed requests in the swaps", "coserve": len(failed), "unit": "requests"},
        {"what": "publication under load, whole", "coserve": 1e3 * median(took), "unit": "ms"},
    ]
    rows[1] |= {"swaps": swaps, "answered": answered[0], "errors": sorted(set(failed))[:3]}
    for row in rows:
        print(row, file=sys.stderr)
    return rows


# ------------------------------------------------------------------ the whole


def describe(server: Server, count: int) -> dict[str, Any]:
    """How long a server took to start, and what it holds."""
    row = {"what": "start", "adapters": count, "coserve": server.ready_seconds, "unit": "s"}
    row |= {"bytes": proportional_memory(server.processes())}
    print(row, file=sys.stderr)
    return row


def measure(model: Path, vocab: int, quick: bool, folder: Path) -> dict[str, Any]:
    """Headline and rows."""
    count, swaps = (QUICK_COUNT, QUICK_SWAPS) if quick else (COUNT, SWAPS)
    load = Load(4, 16, 64, 16) if quick else LOAD
    sources, state = folder / "sources", folder / "state"
    write_adapters(sources, model, count)
    flags = ["--adapter-root", str(sources), "--max-lora-rank", str(RANK)]
    flags += ["--max-loras", str(4 if quick else MAX_LORAS)]
    flags += ["--max-cpu-loras", str(10 if quick else MAX_CPU_LORAS)]
    server = start_coserve(model, state, *flags)
    try:
        rows = [describe(server, 0)]
        took = register(server, sources, count)
        rows.append({"what": "register", "coserve": 1e3 * median(took), "unit": "ms", "adapters": count})
        print(rows[-1], file=sys.stderr)
        server.stop()
        size = registered_bytes(state)
        rows.append({"what": "memory of a registered adapter, server", "coserve": size, "unit": "bytes"})
        print(rows[-1], file=sys.stderr)
        server = start_coserve(model, state, *flags)
        rows.append(describe(server, count))
        base, zipf = rounds(server, count, load, vocab, quick, rows)
        rows += swap_under_load(server, sources, vocab, swaps, load)
        rows.append({"what": "at the end", "bytes": server.memory(), "unit": "bytes", "adapters": count})
    finally:
        with suppress(ProcessLookupError, FileNotFoundError):
            server.stop()
    about = {"concurrency": load.concurrency, "requests": load.requests, "prompt_tokens": load.prompt_tokens}
    about |= {"output_tokens": load.output_tokens, "adapters": count, "zipf": ZIPF, "rank": RANK}
    what = (
        f"generated tokens/s with {count} adapters at Zipf {ZIPF} once warm; the peer is our own base alone"
    )
    return {"headline": common.headline(what, "tokens/s", zipf, base, about), "rows": rows}


def rounds(
    server: Server, count: int, load: Load, vocab: int, quick: bool, rows: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """The base's and the adapters' tokens/s: a round cold, one of short requests to warm up, then pairs."""
    closed_loop(server.port, [MODEL], load, vocab)
    rows.append(zipf_round(server, count, load, vocab, 1, "Zipf, cold"))
    short = Load(load.concurrency, count, 8, 1)
    rows.append(zipf_round(server, count, short, vocab, 2, "Zipf, warming up by short requests"))
    base: list[float] = []
    zipf: list[float] = []
    for seed in range(10, 12 if quick else 14):
        for is_base in (True, False) if seed % 2 else (False, True):
            if is_base:
                base.append(closed_loop(server.port, [MODEL], load, vocab, seed))
                rows.append({"what": "base", "coserve": base[-1], "unit": "tokens/s"})
                print(rows[-1], file=sys.stderr)
            else:
                rows.append(zipf_round(server, count, load, vocab, seed, "Zipf, warm"))
                zipf.append(rows[-1]["coserve"])
    return base, zipf


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    model, vocab = common.model_directory(options.quick), common.vocabulary(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        common.write("adapters", options.out, measure(model, vocab, options.quick, Path(folder)))


if __name__ == "__main__":
    main()
