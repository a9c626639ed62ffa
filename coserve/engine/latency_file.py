"""What the latency model has learnt, from one start of the server to the next.

The engine reads the file; the server, which owns the state directory, writes what the engine hands it now and
then and when it stops. What was learnt with another model, device, precision or number of threads doesn't
hold, and is left alone.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec
import torch

from coserve.core.latency_model import LatencyModel, LatencyState
from coserve.kernels.dispatch import isa
from coserve.models.config import ModelConfig

logger = logging.getLogger(__name__)


class LatencyFile(msgspec.Struct, frozen=True):
    """`setting` says what the costs are of."""

    setting: str
    costs: LatencyState


def setting(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What costs depend on, in words: the model's shape, the device, the precision and the threads."""
    shape = hashlib.blake2b(repr(model).encode(), digest_size=8).hexdigest()
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads of {isa()}"
    return f"{model.family} {shape} in {str(dtype).removeprefix('torch.')} on {where}"


def encode(model: LatencyModel, of: str) -> str:
    """The file's text."""
    return msgspec.json.encode(LatencyFile(of, model.state())).decode()


def restore(model: LatencyModel, path: Path, of: str) -> bool:
    """Go on from the file, if there is one that fits; whether it did. What doesn't is said in the log."""
    if not path.is_file():
        return False
    try:
        found = msgspec.json.decode(path.read_bytes(), type=LatencyFile)
        if found.setting != of:
            raise ValueError(f"it is of {found.setting}, this is {of}")
        model.restore(found.costs)
    except (OSError, ValueError) as error:
        logger.warning("costs are learnt anew, %s doesn't fit: %s", path, error)
        return False
    return True
