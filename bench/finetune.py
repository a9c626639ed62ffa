"""Fine-tuning alone: coserve's engine beside PEFT, 512 tokens a step, rank 16 on all linears, AdamW.

The base is the 0.5B shape in bf16 with random weights. PEFT runs its best setting here (bf16 autocast, no
checkpointing) and, in `rows`, as people run it (fp32 adapters without autocast). Both sides have the tuned
allocator.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import common
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

TOKENS, RANK = 512, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Peft:
    """The peer: autograd, torch's fused AdamW, clipping."""

    def __init__(self, model: Path, ids: torch.Tensor, steps: int, *, autocast: bool) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(MODULES), task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, weight_decay=0.0, fused=True)
        self.ids, self.steps, self.autocast = ids, steps, autocast

    def __call__(self) -> float:
        """Trained tokens/s over `steps` optimizer steps."""
        began = time.perf_counter()
        with torch.enable_grad():
            for _ in range(self.steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return self.steps * TOKENS / (time.perf_counter() - began)


class Coserve:
    """Ours: one long job in an engine that nobody chats with."""

    def __init__(self, model: Path, ids: torch.Tensor, steps: int, folder: Path) -> None:
        self.local = LocalEngine(common.engine_config(model))
        self.steps = steps
        sample = ids[0].tolist()
        TokenDataset.write(folder / "data", [(sample, sample)])
        endless = 1_000_000
        training = TrainingSpec(
            batch_size=1, max_steps=endless, n_epochs=endless, checkpoint_steps=endless, warmup_ratio=0.0
        )
        spec = JobSpec(
            job_id="bench",
            data_path=str(folder / "data"),
            checkpoint_dir=str(folder / "checkpoints"),
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES),
            training=training,
        )
        self.local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))

    def __call__(self) -> float:
        """Trained tokens/s over `steps` optimizer steps."""
        done = 0

        def enough() -> bool:
            nonlocal done
            failed = [status.message for status in self.local.take(m.JobStatus) if status.status == "failed"]
            if failed:
                raise RuntimeError(failed[0])
            done += len(self.local.take(m.JobProgress))
            return done >= self.steps

        return self.steps * TOKENS / self.local.run_until(enough)


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    steps, rounds = (1, 2) if options.quick else (1, 5)
    model = common.model_directory(options.quick)
    vocab = 8192 if options.quick else common.M1["vocab_size"]
    ids = torch.randint(10, vocab - 10, (1, TOKENS), generator=torch.Generator().manual_seed(2))  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        ours = Coserve(model, ids, steps, Path(folder))
        best = Peft(model, ids, steps, autocast=True)
        ours(), best()
        mine, theirs = common.paired(ours, best, rounds)
        del best
        plain = Peft(model, ids, steps, autocast=False)
        plain()
        again, usual = common.paired(ours, plain, max(2, rounds - 2))
    load = {"concurrency": 1, "prompt_tokens": TOKENS, "output_tokens": 0, "rank": RANK}
    what = "trained tokens/s, 512 tokens a step, rank 16 on all linears; the peer is PEFT in bf16 autocast"
    rows = [
        {"peer_setting": setting, "coserve": a, "peer": b, "unit": "tokens/s"}
        for setting, ours_, peers in (("bf16 autocast", mine, theirs), ("fp32 adapters", again, usual))
        for a, b in zip(ours_, peers, strict=True)
    ]
    common.write(
        "finetune",
        options.out,
        {"headline": common.headline(what, "tokens/s", mine, theirs, load), "rows": rows},
    )


if __name__ == "__main__":
    main()
