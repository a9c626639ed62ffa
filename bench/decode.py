"""Decoding a batch of 8: coserve's engine beside transformers' `generate`, on the 0.5B shape in bf16.

Both prefill the same prompts first; only the time of the decode steps counts.
"""

from __future__ import annotations

import time
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM

from coserve.core.sampling_params import SamplingParams
from coserve.engine.local import LocalEngine

BATCH, PROMPT = 8, 128


def prompts(vocab: int) -> list[list[int]]:
    """Random token ids, the same for both sides."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, vocab - 10, (BATCH, PROMPT), generator=generator).tolist()


class Transformers:
    """The peer: `generate` with its own KV cache."""

    def __init__(self, model: Path, ids: list[list[int]], tokens: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.ids, self.tokens = torch.tensor(ids), tokens

    def __call__(self) -> float:
        """Decoded tokens/s: the time of `tokens` + 1 new tokens minus that of one."""
        return BATCH * self.tokens / (self._seconds(self.tokens + 1) - self._seconds(1))

    def _seconds(self, tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        return time.perf_counter() - began


class Coserve:
    """Ours: eight requests in one engine, whole prompts first."""

    def __init__(self, model: Path, ids: list[list[int]], tokens: int) -> None:
        self.local = LocalEngine(common.engine_config(model))
        self.ids, self.tokens = ids, tokens
        self.round = 0

    def __call__(self) -> float:
        """Decoded tokens/s from the step after the last prompt to the last token."""
        self.round += 1
        scheduler = self.local.engine.scheduler
        sampling = SamplingParams(max_tokens=self.tokens + 1, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(self.ids):
            self.local.add(f"r{self.round}-{index}", prompt, sampling)
        self.local.run_until(lambda: len([r for r in scheduler.running if r.num_output_tokens]) == BATCH)
        left = sum(self.tokens + 1 - r.num_output_tokens for r in scheduler.running)
        return left / self.local.run_until(lambda: not scheduler.has_requests)


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    common.with_tuned_allocator()
    torch.set_num_threads(common.THREADS)
    tokens, rounds = (16, 2) if options.quick else (32, 5)
    model = common.model_directory(options.quick)
    ids = prompts(common.vocabulary(options.quick))
    ours, peer = Coserve(model, ids, tokens), Transformers(model, ids, tokens)
    ours(), peer()
    mine, theirs = common.paired(ours, peer, rounds)
    load = {"concurrency": BATCH, "prompt_tokens": PROMPT, "output_tokens": tokens}
    what = "decoded tokens/s at batch 8, transformers generate as the peer"
    rows = [{"coserve": a, "peer": b, "unit": "tokens/s"} for a, b in zip(mine, theirs, strict=True)]
    headline = common.headline(what, "tokens/s", mine, theirs, load)
    common.write("decode", options.out, {"headline": headline, "rows": rows})


if __name__ == "__main__":
    main()
