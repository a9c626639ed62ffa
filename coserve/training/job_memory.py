"""What a fine-tuning job holds outside the pool, known from its settings before anything is made. Torch-free.

Of P trained elements: masters 4P bytes (and those of a frozen A), gradients twice 4P, since they are kept
beside once a step was lost to requests, and the optimizer's moments. The data set itself is mapped; its
examples' lengths and their order in an epoch are in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from coserve.models.config import ModelConfig
from coserve.training.job import JobSpec, LoraSpec, TrainingSpec
from coserve.training.lora_settings import resolve_lora

QUANTIZED_FROM = 4096  # elements: smaller tensors keep fp32 moments, as in bitsandbytes
BLOCK, BLOCK_BYTES = 256, 540  # of 8-bit moments: elements, and codes, scales, place and rate of them
EXAMPLE_BYTES = 16  # its length, and its place in the epoch's order; the same again for packs


class JobMemory(NamedTuple):
    """Bytes."""

    masters: int
    gradients: int
    moments: int
    data: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def job_memory(lora: LoraSpec, training: TrainingSpec, model: ModelConfig, examples: int = 0) -> JobMemory:
    """For a job of these settings, and so many training examples. Raises InvalidRequest as `resolve_lora`."""
    resolved = resolve_lora(lora, model)
    trained, frozen = [], 0
    for path, (layer, name) in model.adapter_places.items():
        if resolved.targets(path, layer):
            out, into = model.module_shape(name)
            rank = resolved.rank(path)
            trained.append(rank * out)
            if lora.freeze_a:
                frozen += rank * into
            else:
                trained.append(rank * into)
    elements = sum(trained)
    return JobMemory(
        masters=4 * (elements + frozen),
        gradients=8 * elements,
        moments=_moments(trained, training),
        data=EXAMPLE_BYTES * examples * (2 if training.packing else 1),
    )


def _moments(sizes: list[int], training: TrainingSpec) -> int:
    if training.optimizer == "sgd":
        return 4 * sum(sizes) if training.momentum else 0
    if training.optimizer != "adamw_8bit":
        return 8 * sum(sizes)
    large = [size for size in sizes if size >= QUANTIZED_FROM]
    small = sum(size for size in sizes if size < QUANTIZED_FROM)
    return 8 * small + BLOCK_BYTES * sum(-(-size // BLOCK) for size in large)


def memory_of(spec: JobSpec, model: ModelConfig) -> JobMemory:
    """For a job as the engine gets it; data that can't be read counts for nothing here."""
    offsets = Path(spec.data_path) / "offsets.npy"
    examples = offsets.stat().st_size // 8 if spec.data_path and offsets.exists() else 0
    return job_memory(spec.lora, spec.training, model, examples)


def too_large(need: int, left: int) -> str:
    """What to say of a job that can never fit: `left` bytes are what all jobs may have outside the pool."""
    return (
        f"The job's weights, gradients and optimizer state need {need} bytes, and beside the model and the "
        f"pool there are {left}. Lower lora.r or adapt fewer modules, set training.optimizer to adamw_8bit, "
        "or start the server with a smaller --kv-cache-memory-bytes."
    )
