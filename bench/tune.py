"""Tunes the Triton kernels on the CUDA device at hand and writes coserve/kernels/triton/tables.json.

Every setting that a kernel file names is timed on its example, all in turn; another than the default is taken
when it is at least 3% faster. Settings that the device has no room for are passed over. Commit the table.

    coserve bench tune [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from coserve.kernels.triton.tuning import TABLES, Tuned, architecture, override, tables

GAIN = 0.97
Timer = Callable[[Callable[[], Any]], float]


def best_setting(
    tuned: Tuned, device: torch.device, timer: Timer
) -> tuple[Mapping[str, int], dict[str, float]]:
    """The setting to use, and the time of each by its text."""
    assert tuned.example is not None
    run = tuned.example(device)
    times: dict[str, float] = {}
    best, limit = tuned.default, float("inf")
    for setting in (tuned.default, *tuned.candidates):
        with override(tuned, setting):
            try:
                seconds = timer(run)
            except Exception as error:
                print(f"  {json.dumps(setting)}: {type(error).__name__}", file=sys.stderr)
                continue
        times[json.dumps(setting)] = seconds
        if seconds < limit:
            best, limit = setting, seconds if setting is not tuned.default else seconds * GAIN
    return best, times


def main(names: list[str]) -> None:
    """Tune all kernels, or those of these names."""
    if not torch.cuda.is_available():
        raise SystemExit("tune: there is no CUDA device to tune for.")
    import triton.testing

    from coserve.kernels.triton.aot import all_cases

    device = torch.device("cuda", torch.cuda.current_device())
    known = {case.tuned.name: case.tuned for case in all_cases()}
    table = {name: dict(kernels) for name, kernels in tables().items()}
    own = table.setdefault(architecture(device), {})
    for name in names or sorted(known):
        tuned = known[name]
        if tuned.example is None or not tuned.candidates:
            continue
        best, times = best_setting(
            tuned, device, lambda run: triton.testing.do_bench(run, return_mode="median")
        )
        gain = times.get(json.dumps(tuned.default), float("nan")) / times[json.dumps(best)]
        print(f"{name}: {json.dumps(best)}, {gain:.2f} times the default's speed")
        own.pop(name, None)
        if best != tuned.default:
            own[name] = dict(best)
    TABLES.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
