"""Where each microsecond of a step goes: operation by operation against its roof, and Python's share.

The 0.5B shape in bf16 (or `--model DIR`) in an engine of this process. Each mix is run for a number of steps:
decoding by 1, 8 and 32 requests, a prompt of 512 tokens, training alone (512 tokens, rank 16 on all linears),
and 8 decoding requests beside that training. The roofs (bytes a second of a copy, arithmetic a second of the
best base product) are measured on the spot. `--trace FILE` writes the mixed steps for chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from ledger import Ledger, installed
from roofs import Roofs, measure_roofs

from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

RANK, CONTEXT, TRAIN_TOKENS = 16, 128, 512


class Bench:
    """An engine and the mixes that are run on it."""

    def __init__(self, model: Path, dtype: str, folder: Path) -> None:
        self.local = LocalEngine(common.engine_config(model, dtype=dtype, max_num_seqs=64))
        self.vocab = self.local.engine.model_config.vocab_size
        self.folder = folder
        self.generator = torch.Generator().manual_seed(3)
        self.made = 0

    def tokens(self, count: int) -> list[int]:
        return torch.randint(10, self.vocab - 10, (count,), generator=self.generator).tolist()

    def request(self, prompt_tokens: int) -> str:
        """Queue a request that decodes until it is aborted."""
        self.made += 1
        name = f"step-{self.made}"
        sampling = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
        self.local.add(name, self.tokens(prompt_tokens), sampling)
        return name

    def abort(self, names: list[str]) -> None:
        self.local.engine.handle(m.AbortRequests(request_ids=names))

    def start_training(self) -> None:
        sample = self.tokens(TRAIN_TOKENS)
        TokenDataset.write(self.folder / "data", [(sample, sample)])
        modules = tuple(self.local.engine.model_config.linear_modules)
        spec = JobSpec(
            job_id="step",
            data_path=str(self.folder / "data"),
            checkpoint_dir=str(self.folder / "checkpoints"),
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=modules),
            training=TrainingSpec(
                batch_size=1, max_steps=1 << 20, n_epochs=1 << 20, checkpoint_steps=1 << 20, warmup_ratio=0.0
            ),
        )
        self.local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))

    def control(self, action: str) -> None:
        self.local.call(lambda call_id: m.ControlJob(call_id=call_id, job_id="step", action=action))

    # ------------------------------------------------------------------ mixes: (ledger, steps, seconds)

    def record(self, steps: int) -> tuple[Ledger, int, float]:
        with installed(Ledger()) as ledger:
            return ledger, steps, self.steps(steps)

    def steps(self, count: int) -> float:
        """Seconds of so many steps as they are served, without the stopwatch."""
        began = time.perf_counter()
        for _ in range(count):
            self.local.engine.step()
        return time.perf_counter() - began

    def decode(self, requests: int, steps: int) -> tuple[Ledger, int, float]:
        names = [self.request(CONTEXT) for _ in range(requests)]
        self.local.run_until(lambda: all(name in self.local.tokens for name in names))
        for _ in range(3):
            self.local.engine.step()
        alone = self.steps(steps) if not self.local.engine.jobs.has_work else None
        ledger, _, seconds = self.record(steps)
        self.abort(names)
        return ledger, steps, seconds if alone is None else alone + ledger.overhead

    def prefill(self, tokens: int) -> tuple[Ledger, int, float]:
        name = self.request(tokens)
        recorded = self.record(1)
        self.abort([name])
        return recorded

    def optimizer_steps(self, count: int) -> tuple[Ledger, int, float]:
        """Whole optimizer steps; `steps` of the result counts those."""
        self.local.take(m.JobProgress)
        done = 0

        def ended() -> bool:
            nonlocal done
            done += len(self.local.take(m.JobProgress))
            return done >= count

        with installed(Ledger()) as ledger:
            return ledger, count, self.local.run_until(ended)


def table(mix: str, ledger: Ledger, steps: int, seconds: float, roofs: Roofs) -> list[dict[str, Any]]:
    """A row an operation, largest first, then what is left: Python, scheduling, sampling, copies."""
    rows: list[dict[str, Any]] = []
    seconds -= ledger.overhead
    for name, entry in sorted(ledger.entries.items(), key=lambda item: -item[1].seconds):
        rows.append(
            {
                "mix": mix,
                "operation": name,
                "calls": entry.calls / steps,
                "ms": entry.seconds / steps * 1e3,
                "share": entry.seconds / seconds,
                "gflop_per_s": entry.flop / entry.seconds / 1e9,
                "gb_per_s": entry.moved / entry.seconds / 1e9,
                "of_roof": roofs.seconds(entry.flop, entry.moved) / entry.seconds,
            }
        )
    rest = seconds - ledger.seconds
    rows.append(
        {"mix": mix, "operation": "python and the rest", "ms": rest / steps * 1e3, "share": rest / seconds}
    )
    rows.append({"mix": mix, "operation": "step", "ms": seconds / steps * 1e3, "share": 1.0})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table as text."""
    for row in rows:
        line = f"{row['mix']:24} {row['operation']:26} {row['ms']:9.2f} ms {row['share']:6.1%}"
        if "calls" in row:
            line += f" {row['calls']:4.0f} x {row['gflop_per_s']:7.0f} GFLOP/s {row['gb_per_s']:6.1f} GB/s "
            line += f"{row['of_roof']:6.1%} of roof"
        print(line)


def main() -> None:
    """Run the mixes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file (default: under bench/results)")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, to see it work")
    parser.add_argument("--model", type=Path, help="another model directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--trace", type=Path, help="write the mixed steps as a Chrome trace")
    options = parser.parse_args()
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    model = options.model or common.model_directory(options.quick)
    steps = 3 if options.quick else 20
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, options.dtype, Path(folder))
        roofs = measure_roofs(getattr(torch, options.dtype))
        for requests in (1, 8, 32):
            rows += table(f"decode {requests}", *bench.decode(requests, steps), roofs)
        bench.prefill(512)
        rows += table("prefill 512", *bench.prefill(512), roofs)
        bench.start_training()
        bench.optimizer_steps(1)
        rows += table(f"train {TRAIN_TOKENS}", *bench.optimizer_steps(1 if options.quick else 2), roofs)
        mixed = bench.decode(8, steps)
        rows += table("decode 8 beside training", *mixed, roofs)
        if options.trace:
            options.trace.write_text(json.dumps(mixed[0].trace()) + "\n")
        bench.control("cancel")
    show(rows)
    one = next(row for row in rows if row["mix"] == "decode 1" and row["operation"] == "base linear")
    share = next(row for row in rows if row["mix"] == "decode 1" and row["operation"].startswith("python"))
    result = {
        "headline": {
            "what": "bandwidth of the base's products when one request decodes; the peer is a large copy",
            "coserve": one["gb_per_s"],
            "peer": roofs.bandwidth / 1e9,
            "unit": "GB/s",
            "ratio": one["gb_per_s"] * 1e9 / roofs.bandwidth,
            "spread": [one["of_roof"], one["of_roof"]],
            "load": {"concurrency": 1, "prompt_tokens": CONTEXT, "output_tokens": steps},
        },
        "python_share_at_one_token": share["share"],
        "roofs": {"bytes_per_second": roofs.bandwidth, "operations_per_second": roofs.arithmetic},
        "rows": rows,
    }
    common.write("step", options.out, result)


if __name__ == "__main__":
    main()
