"""Peak memory of one training step above the weights: coserve's activation policies beside PEFT.

Rank 16 on all linears, AdamW, one sample a step, the 0.5B shape in bf16 with random weights; PEFT runs in
bf16 autocast, with and without checkpointing. Each cell is a process of its own. Its baseline is the resident
set once the weights are loaded and have computed a few tokens; then adapter and optimizer are made, a short
step runs, and one of the cell's length until its backward is through the top two layers. Below them memory
only falls or is used again, so the rest of the step would take time and show nothing. The peak is the
kernel's own (VmHWM in /proc/self/status, reset at the baseline through /proc/self/clear_refs). What the
pool's size leaves room for decides coserve's policy, as in a server. A process that grows over the cap is
ended, which is recorded as one that does not fit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import peft_peer
from peft_peer import MODULES, RANK

DEPTH = 2  # layers, from the top, that the long step's backward goes through
SHORT = 64  # tokens of the step that makes whatever is made once
CAP = 14 << 30  # bytes resident
PEERS = ("peft", "peft checkpointed")
POLICIES = ("coserve A", "coserve B", "coserve C")
TARGETS = {  # of PEFT's peak, without checkpointing and with
    "coserve A": (0.5, None),
    "coserve B": (0.3, None),
    "coserve C": (0.15, 0.5),
}


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def samples(vocab: int, tokens: int) -> list[list[int]]:
    """A short sample and one of `tokens`."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return [torch.randint(10, vocab - 10, (n,), generator=generator).tolist() for n in (SHORT, tokens)]


def baseline() -> int:
    """The resident set now; the kernel's high-water mark starts over."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def run_peft(model: Path, tokens: int, vocab: int, *, checkpointed: bool) -> dict[str, Any]:
    """Autograd, torch's AdamW, clipping, whole logits as transformers' loss makes them."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        base(input_ids=torch.tensor([samples(vocab, 8)[1]]), use_cache=False)
    before = baseline()
    adapted = peft_peer.adapted(base, checkpointed=checkpointed)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    short, long = (torch.tensor([sample]) for sample in samples(vocab, tokens))

    def backward(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    backward(short)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    base.model.layers[-DEPTH - 1].register_forward_hook(stop_below)
    with suppress(Enough):
        backward(long)
        raise RuntimeError("the backward went past its end")
    return {"weights_bytes": before}


class Enough(Exception):
    """Raised out of a backward that is deep enough."""


def stop_below(module: object, arguments: object, output: Any) -> None:
    """Forward hook of a layer: its output's gradient is as far as the backward shall go."""
    hidden = output[0] if isinstance(output, tuple) else output

    def stop(gradient: object) -> None:
        raise Enough

    hidden.register_hook(stop)


def pool_bytes(model: Path, tokens: int, policy: str, block_size: int = 16) -> int:
    """The smallest pool in which every layer gets `policy` and the scheduler's headroom stays free."""
    import torch

    from coserve.models.config import ModelConfig
    from coserve.training.activations import MicrobatchActivations
    from coserve.worker.kv_tensors import slab_bytes

    config = ModelConfig.from_dir(model)
    layers = config.num_layers
    level = {"A": 2 * layers, "B": layers, "C": 0}[policy]
    slab = slab_bytes(config, block_size, torch.bfloat16)
    needed = -(-MicrobatchActivations.level_bytes(config, layers, tokens, torch.bfloat16, 0)[level] // slab)
    blocks = needed
    while blocks - max(4, blocks // 8) < needed:
        blocks += 1
    return blocks * slab


def run_coserve(model: Path, tokens: int, vocab: int, *, policy: str) -> dict[str, Any]:
    """A job in an engine that nobody chats with."""
    from coserve.core.sampling_params import SamplingParams
    from coserve.engine import messages as m
    from coserve.engine.local import LocalEngine
    from coserve.training.dataset import TokenDataset
    from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

    settings = common.engine_config(
        model, max_model_len=tokens, max_loras=1, kv_cache_memory_bytes=pool_bytes(model, tokens, policy)
    )
    local = LocalEngine(settings)
    local.generate(list(range(8)), SamplingParams(max_tokens=1, ignore_eos=True))
    before = baseline()
    with tempfile.TemporaryDirectory() as folder:
        TokenDataset.write(Path(folder) / "data", [(ids, ids) for ids in samples(vocab, tokens)])
        spec = JobSpec(
            job_id="bench",
            data_path=f"{folder}/data",
            checkpoint_dir=f"{folder}/checkpoints",
            seed=0,
            lora=LoraSpec(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES),
            training=TrainingSpec(batch_size=1, n_epochs=1, shuffle=False, checkpoint_steps=2),
        )
        local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
        queue = local.engine.scheduler.training

        seen: set[str] = set()

        def deep_enough() -> bool:
            """Under a short step the whole backward may pass, which is deep enough too."""
            status = [s for s in local.sent if isinstance(s, m.JobStatus)][-1]
            if status.status == "failed":
                raise RuntimeError(status.message)
            under_way = [s for s in queue.sequences if s.num_tokens == tokens and s.extent is not None]
            seen.update(s.policy(height) for s in under_way for height in range(s.layers))
            at_work = [(s.layers, s.units[s.unit_cursor]) for s in under_way if s.forward_done]
            deep = any(unit.kind == "layer" and unit.height < n - DEPTH for n, unit in at_work)
            return deep or status.status == "succeeded"

        local.run_until(deep_enough)
        if seen != {policy}:
            raise RuntimeError(f"policies in force were {sorted(seen)}, not {policy}")
    return {"weights_bytes": before}


def run_cell(side: str, model: Path, tokens: int, vocab: int, answer: Connection) -> None:
    """In the child: run, and send what it took."""
    import torch

    torch.set_num_threads(common.THREADS)
    kind, _, variant = side.partition(" ")
    if kind == "peft":
        found = run_peft(model, tokens, vocab, checkpointed=bool(variant))
    else:
        found = run_coserve(model, tokens, vocab, policy=variant)
    peak = status("VmHWM")
    answer.send(found | {"peak_bytes": peak, "above_weights_bytes": peak - found["weights_bytes"]})


def measure(side: str, model: Path, tokens: int, vocab: int) -> dict[str, Any]:
    """One cell in a fresh process, watched so that it doesn't outgrow the cap."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=run_cell, args=(side, model, tokens, vocab, sender))
    child.start()
    sender.close()
    row: dict[str, Any] = {"side": side, "tokens": tokens, "fits": True}
    statm = Path(f"/proc/{child.pid}/statm")
    while not receiver.poll(0.02):
        if not child.is_alive():
            break
        resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > CAP:
            child.kill()
            row |= {"fits": False, "reached_bytes": resident, "cap_bytes": CAP}
            break
    if row["fits"]:
        try:
            row |= receiver.recv()
        except EOFError as error:
            raise RuntimeError(f"{side} at {tokens} tokens ended with exit code {child.exitcode}") from error
    child.join()
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """Add to coserve's rows what part of PEFT's peak they are, where PEFT fits, and the target."""
    peaks = {(row["side"], row["tokens"]): row.get("above_weights_bytes") for row in rows}
    for row in rows:
        for peer, target in zip(PEERS, TARGETS.get(row["side"], ()), strict=False):
            theirs = peaks.get((peer, row["tokens"]))
            if theirs and row["fits"]:
                row[f"of {peer}"] = row["above_weights_bytes"] / theirs
                if target is not None:
                    row[f"target of {peer}"] = target


def main() -> None:
    """Measure and write the result."""
    options = common.arguments(__doc__ or "")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # time is not measured, so be a good neighbour
    lengths = (128, 256) if options.quick else (512, 2048, 8192)
    model = common.model_directory(options.quick)
    vocab = common.vocabulary(options.quick)
    rows = [measure(side, model, tokens, vocab) for tokens in lengths for side in (*PEERS, *POLICIES)]
    with_ratios(rows)
    peaks = {(row["side"], row["tokens"]): row.get("above_weights_bytes") for row in rows}
    at = lengths[1]
    ours, theirs = peaks["coserve C", at], peaks["peft", at]
    others = [row["of peft"] for row in rows if row["side"] == "coserve C" and "of peft" in row]
    headline = {
        "what": f"peak memory of a training step of {at} tokens above the weights, policy C; the peer is "
        "PEFT in bf16 autocast without checkpointing",
        "coserve": ours,
        "peer": theirs,
        "unit": "bytes",
        "ratio": ours / theirs if ours and theirs else None,
        "spread": [min(others), max(others)] if others else [],
        "load": {"concurrency": 1, "prompt_tokens": at, "output_tokens": 0, "rank": RANK},
    }
    common.write("memory", options.out, {"headline": headline, "rows": rows})


if __name__ == "__main__":
    main()
