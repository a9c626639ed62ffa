"""What a request waits for that arrives at training alone: the stops of a training step, piece by piece.

The 0.5B shape in bf16 in an engine of this process trains rank 16 on all linears. A stop is the time from one
look for arrivals to the next; an arrival at a random moment waits for the rest of the stop it falls into, so
long stops count by their length. Beside it, in turn, the same with calls of units and updates that never rest
inside, whose throughput says what the looking costs.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import common
import torch

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec
from coserve.training.job_manager import JobManager
from coserve.training.running_job import RunningJob
from coserve.training.unit_calls import UnitCalls, never
from coserve.worker.model_runner import ModelRunner

RANK, TOKENS, EXAMPLES, BATCH, SAVE_EVERY = 16, 512, 8, 1, 3


class Stops:
    """Seconds between two looks for arrivals, by what ran then."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.kind = "between"
        self._last = time.perf_counter()

    @property
    def every(self) -> list[float]:
        """Of all kinds."""
        return list(chain.from_iterable(self.seconds.values()))

    def look(self) -> bool:
        """The engine looks for arrivals, and there is none."""
        now = time.perf_counter()
        self.seconds[self.kind].append(now - self._last)
        self._last = now
        return False

    def during(self, name: Callable[..., str], function: Any) -> Any:
        """`function`, whose stops count as `name` of its arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.kind = self.kind, name(*args)
            try:
                return function(*args, **kwargs)
            finally:
                self.look()
                self.kind = before

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Tell the kinds of work apart while the block runs."""
        launch, apart, complete = JobManager._launch, ModelRunner.run_apart, RunningJob.complete
        with (
            mock.patch.object(JobManager, "_launch", self.during(_kind, launch)),
            mock.patch.object(ModelRunner, "run_apart", self.during(lambda *_: "window", apart)),
            mock.patch.object(RunningJob, "complete", self.during(lambda *_: "update", complete)),
        ):
            yield


def _kind(manager: JobManager, sequence: Any, *rest: Any) -> str:
    return str(sequence.unit_kind(sequence.unit_cursor))


@contextmanager
def undivided() -> Iterator[None]:
    """Calls and updates that don't rest inside."""
    run_next, complete = UnitCalls.run_next, RunningJob.complete
    with (
        mock.patch.object(UnitCalls, "run_next", lambda self, length=1, stop=never: run_next(self, length)),
        mock.patch.object(RunningJob, "complete", lambda self, stop=never: complete(self)),
    ):
        yield


def waits(seconds: list[float]) -> dict[str, float]:
    """Milliseconds that arrivals at random moments wait: mean, median, 99th percentile, the longest."""
    stops = sorted(seconds, reverse=True)
    total = sum(stops)

    def later(wait: float) -> float:
        return sum(stop - wait for stop in stops if stop > wait) / total

    def quantile(part: float) -> float:
        low, high = 0.0, stops[0]
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if later(middle) > 1.0 - part else (low, middle)
        return high

    mean = sum(stop * stop for stop in stops) / (2.0 * total)
    figures = {"mean": mean, "p50": quantile(0.5), "p99": quantile(0.99), "most": stops[0]}
    return {name: value * 1e3 for name, value in figures.items()}


class Bench:
    """An engine that trains."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.local = LocalEngine(common.engine_config(model))
        vocab = self.local.engine.model_config.vocab_size
        generator = torch.Generator().manual_seed(3)
        rows = torch.randint(10, vocab - 10, (EXAMPLES, TOKENS), generator=generator).tolist()
        TokenDataset.write(folder / "data", [(row, row) for row in rows])
        modules = tuple(self.local.engine.model_config.linear_modules)
        steps = {"max_steps": 1 << 20, "n_epochs": 1 << 20, "checkpoint_steps": SAVE_EVERY}
        spec = JobSpec(
            job_id="arrivals",
            data_path=str(folder / "data"),
            checkpoint_dir=str(folder / "checkpoints"),
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=modules),
            training=TrainingSpec(batch_size=BATCH, warmup_ratio=0.0, **steps),
        )
        self.local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
        self.optimizer_steps(1, never)

    def optimizer_steps(self, count: int, look: Callable[[], bool]) -> float:
        """Seconds of so many, looking for arrivals as a served engine does."""
        self.local.take(m.JobProgress)
        self.local.engine.arrivals = look
        began, done = time.perf_counter(), 0
        while done < count:
            look()
            self.local.engine.step()
            done += len(self.local.take(m.JobProgress))
        return time.perf_counter() - began


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    rounds, steps = (1, SAVE_EVERY) if options.quick else (3, SAVE_EVERY)
    found = {"pieces": Stops(), "whole calls": Stops()}
    means: dict[str, list[float]] = defaultdict(list)
    took: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(common.model_directory(options.quick), Path(folder))
        for _ in range(rounds):
            for name, stops in found.items():
                now = Stops()
                with now.installed():
                    if name == "pieces":
                        took[name].append(bench.optimizer_steps(steps, now.look))
                    else:
                        with undivided():
                            took[name].append(bench.optimizer_steps(steps, now.look))
                means[name].append(waits(now.every)["mean"])
                for kind, seconds in now.seconds.items():
                    stops.seconds[kind] += seconds
    rows: list[dict[str, Any]] = []
    for name, stops in found.items():
        every = stops.every
        rows.append({"calls": name, "kind": "all", "stops": len(every), "share": 1.0, **waits(every)})
        for kind, seconds in sorted(stops.seconds.items()):
            share = sum(seconds) / sum(every)
            rows.append(
                {"calls": name, "kind": kind, "stops": len(seconds), "share": share, **waits(seconds)}
            )
    for row in rows:
        wait = ", ".join(f"{name} {row[name]:6.1f}" for name in ("mean", "p50", "p99", "most"))
        stops = f"{row['calls']:12} {row['kind']:10} {row['stops']:6} stops, {row['share']:6.1%} of the time"
        print(f"{stops}; ms of waiting: {wait}")
    kept = median(b / a for a, b in zip(took["pieces"], took["whole calls"], strict=True))
    print(f"training at {kept:.3f} of its pace in whole calls")
    load = {"concurrency": 1, "tokens": TOKENS, "batch": BATCH}
    what = "mean wait of an arrival at training alone; the peer: calls that never rest"
    headline = common.headline(what, "ms", means["pieces"], means["whole calls"], load)
    common.write("arrivals", options.out, {"headline": headline, "rows": rows, "pace_kept": kept})


if __name__ == "__main__":
    main()
