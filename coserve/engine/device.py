"""Which device, which precision, how much memory: decided once at start."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from coserve.config import EngineConfig
from coserve.engine.memory_limit import memory_limit
from coserve.errors import ConfigError
from coserve.models.config import ModelConfig
from coserve.worker.kv_tensors import slab_bytes

CPU_POOL_DEFAULT = 4 << 30  # bytes of KV and activations on a CPU, where memory is everybody's
SMALL_MODEL = 50_000_000  # parameters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ConfigError for a device that isn't here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu.", param="device")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: use auto, cpu or cuda.", param="device")
    return torch.device(name)


def resolve_threads(config: ModelConfig) -> int:
    """Compute threads: every core, but one less for a small model.

    Its parallel regions last microseconds, and a core that the server's process needs too stalls the whole
    team for a time slice at each of them.
    """
    cores = usable_cores()
    return max(1, cores - 1) if config.num_parameters < SMALL_MODEL else cores


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Physical cores that this process may run on: its affinity, one thread a core, and its cgroup's quota.

    Two threads of one core share its vector units, so a second one adds waiting and no arithmetic.
    """
    allowed = os.sched_getaffinity(0)
    siblings = {_siblings(cpu) or str(cpu) for cpu in allowed}
    quota = _cpu_quota(cgroup)
    return len(siblings) if quota >= len(siblings) else max(1, int(quota))


def _siblings(cpu: int) -> str:
    """The hardware threads of this one's core, as the kernel lists them; empty where it doesn't say."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else ""


def _cpu_quota(cgroup: Path) -> float:
    """Cores' worth of time that the cgroup grants, infinite without a limit: cpu.max, or cfs files in v1."""
    second, first = cgroup / "cpu" / "cpu.cfs_period_us", cgroup / "cpu" / "cpu.cfs_quota_us"
    if (cgroup / "cpu.max").exists():
        quota, period = (cgroup / "cpu.max").read_text().split()
    elif first.exists() and second.exists():
        quota, period = first.read_text(), second.read_text()
    else:
        return math.inf
    return math.inf if quota == "max" or float(quota) <= 0 else float(quota) / float(period)


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype; small models run in fp32 on a CPU, where bf16 gains nothing."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"--dtype {name}: use auto, float32 or bfloat16.", param="dtype")
    small = config.num_parameters < SMALL_MODEL and device.type == "cpu"
    return torch.float32 if small or config.torch_dtype == "float32" else torch.bfloat16


def memory_plan(
    config: EngineConfig, model: ModelConfig, max_model_len: int, device: torch.device, dtype: torch.dtype
) -> int:
    """Number of slabs in the pool. Raises ConfigError when not even one whole context fits."""
    slab = slab_bytes(model, config.block_size, dtype)
    pool = config.kv_cache_memory_bytes
    if pool == 0 and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        pool = int(free - total * (1.0 - config.gpu_memory_utilization))
    elif pool == 0:
        available = min(memory_limit(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        pool = min(CPU_POOL_DEFAULT, int(available * config.gpu_memory_utilization / 2))
    blocks = max(0, pool) // slab
    needed = -(-max_model_len // config.block_size)
    if blocks < needed:
        raise ConfigError(
            f"The KV pool of {max(0, pool)} bytes holds {blocks * config.block_size} tokens, "
            f"fewer than the context of {max_model_len}; raise --kv-cache-memory-bytes to at least "
            f"{needed * slab} or lower --max-model-len.",
            param="kv_cache_memory_bytes",
        )
    return blocks
