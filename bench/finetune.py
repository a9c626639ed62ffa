"""Fine-tuning alone: coserve's engine beside PEFT, rank 16 on all linears, AdamW, one sample a step.

The base is the 0.5B shape in bf16 with random weights. The headline is 512 tokens a step, its peer PEFT's
best setting there: bf16 autocast, no checkpointing, the tuned allocator that our side has too. `rows` have
512 and 2048 tokens, each beside PEFT plain, checkpointed, and as people run it (no autocast, the default
allocator); and at 512 a prompt of half the tokens that carries no loss, and adapters in the upper half of the
layers only. The last rows are eight chats a step that begin with the same system prompt, beside ourselves
where each prompt's first token differs, so that nothing is shared. A figure counts all tokens of a step's
examples, trained or not, computed once or for each. What each takes in memory is bench/memory.py's to say.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from peft_peer import IGNORED, MODULES, RANK, PeftProcess, Setting, samples

from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.models.config import ModelConfig
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

TOKENS, LONG = 512, 2048
CHATS, SYSTEM, QUESTION, ANSWER = 8, 256, 48, 80  # chats a step, and tokens of each one's parts
Rows = list[tuple[list[int], list[int]]]


class Coserve:
    """Ours: an engine that nobody chats with, and one long job at a time."""

    def __init__(self, model: Path, vocab: int, folder: Path) -> None:
        self.local = LocalEngine(common.engine_config(model))
        self._vocab = vocab
        self._folder = folder
        self._job_id = ""
        self._tokens = 0

    def train(self, setting: Setting) -> None:
        """Begin a job on what `setting` trains on, in the place of the one before."""
        self.train_on([samples(self._vocab, setting.tokens, setting.masked)], setting.layers)

    def train_on(self, rows: Rows, layers: tuple[int, ...] = ()) -> None:
        """The same with all of `rows` in every step."""
        if self._job_id:
            self._call(m.ControlJob, job_id=self._job_id, action="cancel")
            self.local.take(m.JobStatus)
        name = f"bench-{len(list(self._folder.iterdir()))}"
        TokenDataset.write(self._folder / name, rows)
        endless = 1_000_000
        spec = JobSpec(
            job_id=name,
            data_path=str(self._folder / name),
            checkpoint_dir=str(self._folder / name / "checkpoints"),
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, layers_to_transform=layers),
            training=TrainingSpec(
                batch_size=len(rows),
                max_steps=endless,
                n_epochs=endless,
                checkpoint_steps=endless,
                warmup_ratio=0.0,
            ),
        )
        self._call(m.SubmitJob, spec=spec)
        self._job_id, self._tokens = name, sum(len(ids) for ids, _ in rows)

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

        return self._tokens / self.local.run_until(enough)


def chats(vocab: int, alike: bool) -> Rows:
    """Chats with one system prompt; unless `alike` with a first token of its own for each."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, vocab - 10, (count,), generator=generator).tolist()

    system, rows = tokens(SYSTEM), []
    for chat in range(CHATS):
        answer = tokens(ANSWER)
        first = system[0] if alike else chat
        ids = [first, *system[1:], *tokens(QUESTION), *answer]
        rows.append((ids, [IGNORED] * (SYSTEM + QUESTION) + answer))
    return rows


def measure_chats(ours: Coserve, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of chats that share their system prompt and of such that don't, in turn."""

    def step(alike: bool) -> float:
        ours.train_on(chats(vocab, alike))
        ours()
        return ours()

    shape = f"{CHATS} chats of {SYSTEM + QUESTION + ANSWER} tokens, {SYSTEM} of them system prompt"
    rows = []
    for _ in range(rounds):
        mine, plain = step(True), step(False)
        what = f"ourselves, nothing shared: {shape}"
        rows.append(
            {"peer_setting": what, "coserve": mine, "peer": plain, "ratio": mine / plain, "unit": "tokens/s"}
        )
    figures = (f"{median(row[side] for row in rows):.0f}" for side in ("coserve", "peer"))
    print(f"{shape}: {' beside '.join(figures)} tokens/s", file=sys.stderr)
    return rows


def settings(layers: int) -> list[Setting]:
    """What is measured; the first is the headline's."""
    upper = tuple(range(layers // 2, layers))
    return [
        Setting(TOKENS),
        Setting(TOKENS, checkpointed=True),
        Setting(TOKENS, autocast=False, tuned=False),
        Setting(TOKENS, masked=True),
        Setting(TOKENS, layers=upper),
        Setting(LONG),
        Setting(LONG, checkpointed=True),
        Setting(LONG, autocast=False, tuned=False),
        Setting(LONG, autocast=False, checkpointed=True, tuned=False),
    ]


def measure(model: Path, vocab: int, quick: bool, folder: Path) -> dict[str, Any]:
    """Headline and rows: for each setting a warm-up of both, then rounds in turn."""
    ours = Coserve(model, vocab, folder)
    headline: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    layers = ModelConfig.from_dir(str(model)).num_layers
    for setting in settings(layers)[: 2 if quick else None]:
        rounds = 2 if quick else 3 if headline else 5
        ours.train(setting)
        peer = PeftProcess(model, vocab, setting)
        try:
            ours(), peer()
            mine, theirs = common.paired(ours, peer, rounds)
        finally:
            peer.close()
        pairs = [
            {"peer_setting": str(setting), "coserve": a, "peer": b, "ratio": a / b, "unit": "tokens/s"}
            for a, b in zip(mine, theirs, strict=True)
        ]
        rows += pairs
        print(f"{setting}: {median(mine):.0f} beside {median(theirs):.0f} tokens/s", file=sys.stderr)
        if not headline:
            load = {"concurrency": 1, "prompt_tokens": TOKENS, "output_tokens": 0, "rank": RANK}
            what = f"trained tokens/s, {TOKENS} tokens a step, rank {RANK} on all linears; the peer is PEFT"
            headline = common.headline(f"{what} in bf16 autocast", "tokens/s", mine, theirs, load)
    rows += measure_chats(ours, vocab, 2 if quick else 3)
    return {"headline": headline, "rows": rows}


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    model = common.model_directory(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(model, common.vocabulary(options.quick), options.quick, Path(folder))
    common.write("finetune", options.out, result)


if __name__ == "__main__":
    main()
