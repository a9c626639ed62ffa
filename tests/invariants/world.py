"""A tiny random model, adapters and jobs for it, and engines to run them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

from coserve.config import EngineConfig
from coserve.core.sampling_params import SamplingParams
from coserve.engine import messages as m
from coserve.engine.local import LocalEngine
from coserve.lora.peft_files import read_adapter_info
from coserve.models.config import ModelConfig
from coserve.training.dataset import TokenDataset
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec

VOCAB = 97
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def make_model(folder: Path, **shape: int) -> Path:
    """A random Qwen2 of two layers with biases and grouped heads, in fp32."""
    torch.manual_seed(11)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=shape.get("hidden_size", 32),
        intermediate_size=shape.get("intermediate_size", 48),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 1.4 / config.hidden_size**0.5)
    model.save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, rank: int, seed: int) -> m.AdapterRef:
    """A PEFT adapter with random A and B, strong enough to change answers."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    modules = ["q_proj", "v_proj", "down_proj"]
    peft = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 1.0)
    peft.save_pretrained(folder)
    return ref(folder, model)


def ref(folder: Path, model: Path) -> m.AdapterRef:
    """A PEFT directory as requests name it."""
    info = read_adapter_info(folder, ModelConfig.from_dir(model), None)
    return m.AdapterRef(folder.name, 1, info.digest, str(folder))


def make_data(folder: Path, examples: int = 12, seed: int = 5, prompt: int = 0) -> Path:
    """Examples of unequal lengths whose first third carries no loss; those of more than twice `prompt` tokens
    begin with the same ones."""
    generator = torch.Generator().manual_seed(seed)
    system = torch.randint(2, VOCAB, (prompt,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    rows = []
    for index in range(examples):
        length = 5 + (index * 37) % 120
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        shared = prompt if length > 2 * prompt else 0
        ids[:shared] = system[:shared]
        untrained = max(length // 3, shared + 1) if shared else length // 3
        rows.append((ids, [-100 if i < untrained else t for i, t in enumerate(ids)]))
    TokenDataset.write(folder, rows)
    return folder


def make_engine(model: Path, **settings: Any) -> LocalEngine:
    """An engine with a small pool."""
    defaults = {"kv_cache_memory_bytes": 8 << 20, "max_num_batched_tokens": 256, "max_lora_rank": 8}
    return LocalEngine(EngineConfig(model=str(model), **(defaults | settings)))


def make_job(data: Path, folder: Path, job_id: str = "ftjob-1", **training: Any) -> JobSpec:
    """A job of six optimizer steps over two epochs."""
    priority = training.pop("priority", 0)
    validation = training.pop("validation", None)
    defaults = {"n_epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "checkpoint_steps": 2}
    return JobSpec(
        job_id=job_id,
        data_path=str(data),
        checkpoint_dir=str(folder / job_id),
        seed=3,
        lora=LoraSpec(r=4, lora_alpha=8.0, target_modules=TARGETS),
        training=TrainingSpec(**(defaults | training)),
        priority=priority,
        validation_path=None if validation is None else str(validation),
    )


def submit(local: LocalEngine, spec: JobSpec) -> None:
    """Hand a job over; it must be taken."""
    reply = local.call(lambda call_id: m.SubmitJob(call_id=call_id, spec=spec))
    assert reply.error is None, reply.error


def status_of(local: LocalEngine, job_id: str) -> str | None:
    """The last status that the engine told of a job."""
    found = [s.status for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == job_id]
    return found[-1] if found else None


def finish(local: LocalEngine, *job_ids: str) -> None:
    """Step until the jobs have ended, and ended well."""
    ended = ("succeeded", "failed", "cancelled")
    local.run_until(lambda: all(status_of(local, job_id) in ended for job_id in job_ids), 20_000)
    for job_id in job_ids:
        news = [s for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == job_id]
        assert news[-1].status == "succeeded", news[-1].message


def settle(local: LocalEngine) -> None:
    """Wait for the checkpoints that are on their way to the disk."""
    for job in list(local.engine.jobs._jobs.values()):
        local.engine.jobs._settle(job)


def final_adapter(spec: JobSpec) -> dict[str, torch.Tensor]:
    """The trained tensors of the job's last checkpoint."""
    newest = max(p for p in Path(spec.checkpoint_dir).iterdir() if p.is_dir())
    return load_file(newest / "adapter_model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Both adapters hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def published(local: LocalEngine, job_id: str) -> dict[str, torch.Tensor]:
    """The adapter that the job said it ended with."""
    paths = [s.result_path for s in local.sent if isinstance(s, m.JobStatus) and s.job_id == job_id]
    return load_file(Path(paths[-1]) / "adapter_model.safetensors")


def validations(local: LocalEngine, job_id: str) -> list[tuple[int, float, float]]:
    """(step, valid_loss, valid_accuracy) of every step that was evaluated."""
    news = [s.metrics for s in local.sent if isinstance(s, m.JobProgress) and s.job_id == job_id]
    return [(n.step, n.valid_loss, n.valid_accuracy) for n in news if n.valid_accuracy is not None]


def progress(local: LocalEngine, job_id: str) -> list[tuple[int, float, float]]:
    """(step, loss, grad_norm) of every progress message."""
    news = [s for s in local.sent if isinstance(s, m.JobProgress) and s.job_id == job_id]
    return [(n.metrics.step, n.metrics.loss, n.metrics.grad_norm) for n in news]


def rows_are_idle(local: LocalEngine) -> bool:
    """Adapters on the device are there because nothing else wants their rows."""
    slots = local.engine.slots
    return all(slots.is_idle(key) for key in slots.keys)


def pool_is_empty(local: LocalEngine) -> bool:
    """No slab, no adapter row in use beyond idle caches (I5)."""
    engine = local.engine
    return engine.blocks.num_free == engine.blocks.num_blocks
