"""The loss curve of a real fine-tune beside PEFT's: same adapter to start from, same batches, same schedule.

The demo model in fp32 learns GSM8K's training set (`../shared/data/chat/gsm8k/train.jsonl`; generated sums
where that file is absent, which the result says). PEFT runs under autograd with torch's AdamW on padded
batches. Writes the losses of every step and, with `--plot`, a picture of both curves and their difference.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from coserve.config import DEMO_MODEL_DIR
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.models.config import ModelConfig
from coserve.tokenizer import Tokenizer
from coserve.training.batching import BatchPlan
from coserve.training.data_file import DataFile
from coserve.training.dataset import NOT_TRAINED, TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec
from coserve.training.schedule import Schedule
from coserve.training.trainable_adapter import TrainableAdapter

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "chat" / "gsm8k" / "train.jsonl"
SEED = 7
MAX_LENGTH = 512
LORA = LoraSpec(
    r=16,
    lora_alpha=32,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def rows() -> Iterator[bytes]:
    """Chat rows of GSM8K, or of generated sums."""
    if GSM8K.exists():
        pairs: Iterator[tuple[str, str]] = (
            (row["question"], row["answer"]) for row in map(json.loads, GSM8K.open(encoding="utf-8"))
        )
    else:
        numbers = random.Random(SEED)
        drawn = ((numbers.randint(1, 99), numbers.randint(1, 99)) for _ in range(4000))
        pairs = ((f"A has {a} and B has {b}. How many together?", f"{a} + {b} = {a + b}") for a, b in drawn)
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": messages}).encode()


def ours(spec: JobSpec, model: Path) -> tuple[list[float], float]:
    """Loss of every step of the job in an engine, and the seconds it took."""
    local = LocalEngine(common.engine_config(model, dtype="float32", max_model_len=2048, max_loras=2))
    local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
    losses: list[float] = []

    def ended() -> bool:
        losses.extend(progress.metrics.loss for progress in local.take(m.JobProgress))
        states = local.take(m.JobStatus)
        if any(state.status == "failed" for state in states):
            raise RuntimeError(states[-1].message)
        return any(state.status == "succeeded" for state in states)

    return losses, local.run_until(ended)


def peft(spec: JobSpec, model: Path) -> tuple[list[float], float]:
    """The same through PEFT and autograd."""
    dataset = TokenDataset.open(spec.data_path)
    plan = BatchPlan(dataset, spec.training, spec.seed)
    schedule = Schedule(spec.training, plan.total_steps)
    start = TrainableAdapter(LORA, ModelConfig.from_dir(model), spec.seed)
    config = LoraConfig(
        r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    set_peft_model_state_dict(wrapped, start.tensors())
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=spec.training.weight_decay, fused=True)
    losses: list[float] = []
    began = time.perf_counter()
    with torch.enable_grad():
        for step in range(1, plan.total_steps + 1):
            batch = plan.step(step)
            loss = _batch_loss(wrapped, [dataset[i] for i in batch.examples]) / batch.trained_tokens
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, spec.training.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
    return losses, time.perf_counter() - began


def _batch_loss(model: torch.nn.Module, examples: list[Any]) -> torch.Tensor:
    """Sum of the trained tokens' losses of a padded batch."""
    longest = max(len(ids) for ids, _ in examples)
    ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, NOT_TRAINED)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids, labels) in enumerate(examples):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        mask_BT[row, : len(ids)] = 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    logits, targets = logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=NOT_TRAINED, reduction="sum")


def plot(path: Path, mine: list[float], theirs: list[float], data: str) -> None:
    """Both curves above, their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, len(mine) + 1)
    above.plot(steps, theirs, color="#f28e2b", linewidth=3.5, label="PEFT + autograd")
    above.plot(steps, mine, color="#1f3b5c", linewidth=1.0, label="coserve")
    above.set_ylabel("loss, mean over trained tokens")
    above.set_title(f"Demo model, rank 16, {data}: every optimizer step")
    above.legend(frameon=False)
    below.plot(steps, [a - b for a, b in zip(mine, theirs, strict=True)], color="#1f3b5c", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file (default: under bench/results)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see it work")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 8 examples")
    parser.add_argument("--plot", type=Path, help="write a PNG of the curves there")
    options = parser.parse_args()
    common.with_tuned_allocator()
    steps = 5 if options.quick else options.steps
    torch.set_num_threads(common.THREADS)
    model = DEMO_MODEL_DIR
    data = "GSM8K" if GSM8K.exists() else "generated sums"
    with tempfile.TemporaryDirectory() as folder:
        examples = DataFile(rows(), Tokenizer.from_dir(model), MAX_LENGTH)
        TokenDataset.write(Path(folder) / "data", examples)
        training = TrainingSpec(
            max_steps=steps, n_epochs=50, batch_size=8, learning_rate=1e-3, checkpoint_steps=1_000_000
        )
        spec = JobSpec(
            job_id="curves",
            data_path=str(Path(folder) / "data"),
            checkpoint_dir=str(Path(folder) / "checkpoints"),
            seed=SEED,
            lora=LORA,
            training=training,
        )
        mine, seconds = ours(spec, model)
        theirs, peer_seconds = peft(spec, model)
    apart = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    last = min(50, steps)
    a, b = fmean(mine[-last:]), fmean(theirs[-last:])
    result = {
        "headline": {
            "what": f"mean loss of the last {last} of {steps} steps on {data}, demo model in fp32; the peer "
            "is PEFT from the same adapter on the same batches; spread: smallest and largest ratio of a step",
            "coserve": a,
            "peer": b,
            "unit": "nats a token",
            "ratio": a / b,
            "spread": [min(ratios), max(ratios)],
            "load": {"concurrency": 1, "prompt_tokens": 0, "output_tokens": 0, "batch_size": 8, "rank": 16},
        },
        "largest_difference": max(apart),
        "mean_difference": fmean(apart),
        "examples": examples.examples,
        "truncated": examples.truncated,
        "seconds": {"coserve": seconds, "peer": peer_seconds},
        "rows": [
            {"step": step, "coserve": x, "peer": y}
            for step, (x, y) in enumerate(zip(mine, theirs, strict=True), start=1)
        ],
    }
    if options.plot:
        plot(options.plot, mine, theirs, data)
    common.write("curves", options.out, result)


if __name__ == "__main__":
    main()
