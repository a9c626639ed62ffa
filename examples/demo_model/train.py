"""Train the demo model: ``python -m examples.demo_model.train --out DIR --work DIR --steps N``."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.demo_model.batches import CONTEXT, Batch, batches
from examples.demo_model.evaluate import evaluate_model, format_table
from examples.demo_model.train_tokenizer import build, save

ROPE_THETA = 10000.0
WARMUP = 60
DECAY_SHARE = 0.45
CLIP = 1.0


def model_config(vocabulary: int, end: int, pad: int) -> Qwen3Config:
    """The architecture: 6 layers of width 256, 4 query heads on 2 key/value heads of 64."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=ROPE_THETA,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        use_sliding_window=False,
        hidden_act="silu",
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )


def save_model(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write the config and the bfloat16 weights in Hugging Face layout (the tied head is stored once)."""
    out.mkdir(parents=True, exist_ok=True)
    # Readers older than `rope_parameters` and `dtype` look for the top-level names.
    config = model.config.to_diff_dict() | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_theta": ROPE_THETA,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        k: v.detach().to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    partial = out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")


def learning_rate(step: int, progress: float) -> float:
    """Warm-up, plateau, then linear decay to zero at ``progress`` 1, as a factor of the peak rate."""
    return max(0.0, min(1.0, (step + 1) / WARMUP, (1.0 - progress) / DECAY_SHARE))


class Trainer:
    """Model, optimisers and the resumable position in the data stream."""

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.step, self.seconds = args, 0, 0.0
        end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
        self.model = Qwen3ForCausalLM(model_config(tokenizer.get_vocab_size(), end, pad))
        matrices = [p for n, p in self.model.named_parameters() if "layers" in n and p.ndim == 2]
        others = [p for n, p in self.model.named_parameters() if "layers" not in n or p.ndim != 2]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.trunk = self.hidden if args.no_compile else torch.compile(self.hidden, dynamic=True)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final hidden states (rows, length, width) of ``tokens`` (rows, length)."""
        return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state

    @property
    def progress(self) -> float:
        """Share of the budget used up, in steps or in time, whichever is further (1 is the end)."""
        return max(self.step / self.args.steps, self.seconds / (60 * self.args.minutes))

    def train_step(self, batch: Batch) -> float:
        """One optimiser step on ``batch``; returns the mean loss per assistant token in nats."""
        start, factor = time.monotonic(), learning_rate(self.step, self.progress)
        low_precision = (
            contextlib.nullcontext() if self.args.float32 else torch.autocast("cpu", dtype=torch.bfloat16)
        )
        with low_precision:
            hidden = self.trunk(batch.tokens).flatten(0, 1).index_select(0, batch.source)
            logits = hidden @ self.model.lm_head.weight.T
        loss = nn.functional.cross_entropy(logits.float(), batch.target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.monotonic() - start
        return loss.item()

    def checkpoint(self, path: Path) -> None:
        """Write everything needed to go on after an interruption."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def resume(self, path: Path) -> None:
        """Load a checkpoint; the data stream restarts with a seed of its own, so nothing is seen twice."""
        state = torch.load(path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def run(args: argparse.Namespace) -> None:
    """Train from scratch or from the checkpoint in the work directory."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        save(build(args.seed), args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    trainer = Trainer(tokenizer, args)
    if (args.work / "state.pt").exists():
        trainer.resume(args.work / "state.pt")
    seen, smooth = 0, 0.0
    for batch in batches(tokenizer, args.seed + 1000 * trainer.step, args.batch_tokens):
        loss = trainer.train_step(batch)
        seen += batch.tokens.numel()
        smooth = loss if not smooth else 0.97 * smooth + 0.03 * loss
        if trainer.step % 20 == 0:
            place = f"step {trainer.step} progress {trainer.progress:.3f} seconds {trainer.seconds:.0f}"
            print(f"{place} tokens {seen} loss {smooth:.4f}", flush=True)
        last = trainer.progress >= 1
        if trainer.step % args.save_every == 0 or last:
            trainer.checkpoint(args.work / "state.pt")
            save_model(trainer.model, args.out)
        if trainer.step % args.eval_every == 0 or last:
            print(
                format_table(evaluate_model(trainer.model, tokenizer, args.eval_per_task, seed=trainer.step)),
                flush=True,
            )
        if last:
            break


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--work", type=Path, required=True, help="directory of the resumable checkpoint")
    parser.add_argument("--steps", type=int, default=4300)
    parser.add_argument("--minutes", type=float, default=60.0, help="end sooner on a busy or slow machine")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=5120)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=400)
    parser.add_argument("--eval-per-task", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true", help="run eagerly (no C++ compiler needed)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
