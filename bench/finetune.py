"""Fine-tuning alone: coserve's engine beside PEFT, 512 tokens a step, rank 16 on all linears, AdamW.

The base is the 0.5B shape in bf16 with random weights. The headline's peer is PEFT's best setting here: bf16
autocast, no checkpointing, the tuned allocator that our side has too. `rows` have three pairs more: PEFT as
people run it (no autocast, in a process of its own with the default allocator), a prompt of half the tokens
that carries no loss, and adapters in the upper half of the layers only. A figure counts all 512 tokens of a
step, trained or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.models.config import ModelConfig
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

TOKENS, RANK, IGNORED = 512, 16, -100
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEER_PROCESS = "--peer-as-usual"


class Peft:
    """The peer: autograd, torch's fused AdamW, clipping. `layers` () stands for all."""

    def __init__(
        self, model: Path, ids: torch.Tensor, *, autocast: bool, layers: tuple[int, ...] = ()
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=list(MODULES),
            layers_to_transform=list(layers) or None,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, config)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, weight_decay=0.0, fused=True)
        self.ids, self.labels, self.autocast = ids, ids, autocast

    def __call__(self) -> float:
        """Tokens/s over one optimizer step."""
        began = time.perf_counter()
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return TOKENS / (time.perf_counter() - began)


class PeftAsUsual:
    """The peer as people run it, in a process that knows nothing of our allocator's settings."""

    def __init__(self, model: Path, vocab: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        command = [sys.executable, __file__, PEER_PROCESS, str(model), str(vocab)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def __call__(self) -> float:
        """Tokens/s over one optimizer step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer's process ended with code {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Coserve:
    """Ours: an engine that nobody chats with, and one long job at a time."""

    def __init__(self, model: Path, ids: torch.Tensor, folder: Path) -> None:
        self.local = LocalEngine(common.engine_config(model))
        self._sample = ids[0].tolist()
        self._folder = folder
        self._job_id = ""

    def train(self, labels: torch.Tensor, layers: tuple[int, ...] = ()) -> None:
        """Begin another job in the place of the one before."""
        if self._job_id:
            self._call(m.ControlJob, job_id=self._job_id, action="cancel")
            self.local.take(m.JobStatus)
        name = f"bench-{len(list(self._folder.iterdir()))}"
        TokenDataset.write(self._folder / name, [(self._sample, labels[0].tolist())])
        endless = 1_000_000
        spec = JobSpec(
            job_id=name,
            data_path=str(self._folder / name),
            checkpoint_dir=str(self._folder / name / "checkpoints"),
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, layers_to_transform=layers),
            training=TrainingSpec(
                batch_size=1, max_steps=endless, n_epochs=endless, checkpoint_steps=endless, warmup_ratio=0.0
            ),
        )
        self._call(m.SubmitJob, spec=spec)
        self._job_id = name

    def _call(self, message: Callable[..., m.Message], **fields: Any) -> None:
        reply = self.local.call(lambda call_id: message(call_id=call_id, **fields))
        if reply.error is not None:
            raise RuntimeError(reply.error.message)

    def __call__(self) -> float:
        """Tokens/s over one optimizer step."""
        done = 0

        def enough() -> bool:
            nonlocal done
            failed = [status.message for status in self.local.take(m.JobStatus) if status.status == "failed"]
            if failed:
                raise RuntimeError(failed[0])
            done += len(self.local.take(m.JobProgress))
            return done >= 1

        return TOKENS / self.local.run_until(enough)


def token_ids(vocab: int) -> torch.Tensor:
    """The sample, [1, 512]."""
    return torch.randint(10, vocab - 10, (1, TOKENS), generator=torch.Generator().manual_seed(2))


def pair(
    setting: str, ours: Callable[[], float], peer: Callable[[], float], rounds: int
) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """A warm-up each, then `rounds` in turn: our figures, the peer's, and their rows."""
    ours(), peer()
    mine, theirs = common.paired(ours, peer, rounds)
    rows = [
        {"peer_setting": setting, "coserve": a, "peer": b, "ratio": a / b, "unit": "tokens/s"}
        for a, b in zip(mine, theirs, strict=True)
    ]
    print(f"{setting}: {median(row['ratio'] for row in rows):.2f}", file=sys.stderr)
    return mine, theirs, rows


def measure(
    model: Path, vocab: int, rounds: int, folder: Path
) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """The headline's figures (ours, the peer's) and the rows of all pairs."""
    ids = token_ids(vocab)
    masked = ids.clone()
    masked[:, : TOKENS // 2] = IGNORED
    layers = ModelConfig.from_dir(str(model)).num_layers
    upper = tuple(range(layers // 2, layers))
    few = max(2, rounds - 2)
    best = "bf16 autocast, tuned allocator"

    ours = Coserve(model, ids, folder)
    peer = Peft(model, ids, autocast=True)
    ours.train(ids)
    mine, theirs, rows = pair(best, ours, peer, rounds)
    ours.train(masked)
    peer.labels = masked
    rows += pair(f"{best}; half of the tokens without loss", ours, peer, few)[2]
    del peer
    peer = Peft(model, ids, autocast=True, layers=upper)
    ours.train(ids, upper)
    rows += pair(f"{best}; adapters in the upper half of the layers", ours, peer, few)[2]
    del peer
    usual = PeftAsUsual(model, vocab)
    ours.train(ids)
    rows += pair("as people run it: no autocast, default allocator", ours, usual, few)[2]
    usual.close()
    return mine, theirs, rows


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    vocab = 8192 if options.quick else int(str(common.M1["vocab_size"]))
    model = common.model_directory(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs, rows = measure(model, vocab, 2 if options.quick else 5, Path(folder))
    load = {"concurrency": 1, "prompt_tokens": TOKENS, "output_tokens": 0, "rank": RANK}
    what = "trained tokens/s, 512 tokens a step, rank 16 on all linears; the peer is PEFT in bf16 autocast"
    headline = common.headline(what, "tokens/s", mine, theirs, load)
    common.write("finetune", options.out, {"headline": headline, "rows": rows})


def serve_steps(model: str, vocab: str) -> None:
    """The peer's process: a step and its figure for every line read."""
    torch.set_num_threads(common.THREADS)
    peer = Peft(Path(model), token_ids(int(vocab)), autocast=False)
    for _ in sys.stdin:
        print(peer(), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [PEER_PROCESS]:
        serve_steps(*sys.argv[2:])
    else:
        main()
