"""An adapter's weights in host memory, as PEFT's files have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from coserve.errors import InvalidRequest
from coserve.kernels.linear import PackedLinear
from coserve.lora.peft_files import (
    BASE_HEAD_KEY,
    TENSOR_FILE,
    AdapterInfo,
    LinearShapes,
    read_adapter_info,
    tensor_key,
)


@dataclass(frozen=True)
class ModuleWeights:
    """One linear layer's adapter: y += scale * (x A^T) B^T, fp32."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    scale: float


@dataclass(frozen=True)
class HostAdapter:
    """All weights of one adapter version, by (layer, module name)."""

    info: AdapterInfo
    modules: dict[tuple[int, str], ModuleWeights]

    @property
    def digest(self) -> str:
        return self.info.digest

    @property
    def rank(self) -> int:
        return self.info.rank


def load_adapter(
    path: str | Path,
    model: LinearShapes,
    max_rank: int | None = None,
    *,
    base_head: PackedLinear | None = None,
    param: str = "lora_path",
) -> HostAdapter:
    """Check and load a PEFT directory (F32, F16 and BF16 tensors become fp32); `max_rank` None: any rank.

    Raises NotFound and InvalidRequest as `read_adapter_info` does, for weights that are not finite, and where
    the files carry the base's head beside an adapter on it and it isn't `base_head`'s weight.
    """
    info, tensors = read_tensors(path, model, max_rank, base_head=base_head, param=param)
    modules = {}
    for (layer, name), module in info.modules.items():
        module_path = model.module_path(layer, name)
        a, b = (tensors[tensor_key(module_path, side)].float() for side in "AB")
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise InvalidRequest(
                f"cannot load the adapter: {module_path} holds values that are not finite", param=param
            )
        modules[layer, name] = ModuleWeights(a.contiguous(), b.contiguous(), module.scale)
    return HostAdapter(info, modules)


def read_tensors(
    path: str | Path,
    model: LinearShapes,
    max_rank: int | None,
    *,
    base_head: PackedLinear | None = None,
    param: str = "lora_path",
) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """A checked PEFT directory and its tensors by PEFT's keys, as the file has them; raises as `load_adapter`
    does, but for values that aren't finite."""
    info = read_adapter_info(path, model, max_rank, param=param)
    tensors = load_file(Path(info.path) / TENSOR_FILE)
    carried_VH = tensors.get(BASE_HEAD_KEY)
    if carried_VH is not None and base_head is not None and not _same(carried_VH, base_head.unpacked().cpu()):
        raise InvalidRequest(
            f"cannot load the adapter: its {BASE_HEAD_KEY} is not the head of this base model; it was made "
            "for another one",
            param=param,
        )
    return info, tensors


def _same(carried: torch.Tensor, own: torch.Tensor) -> bool:
    """Equal in the narrower of both dtypes."""
    return torch.equal(carried.to(own.dtype), own) or torch.equal(carried, own.to(carried.dtype))
