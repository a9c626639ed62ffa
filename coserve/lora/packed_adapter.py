"""An adapter as host memory keeps it: packed as the pool's rows are, so that bringing it in is copying.

Casting, transposing and scaling are done by the thread that reads the files; between two steps only bytes
move, in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from coserve.errors import FailedPrecondition, InvalidRequest
from coserve.kernels.linear import PackedLinear
from coserve.lora.adapter import HostAdapter, ModuleWeights, read_tensors
from coserve.lora.peft_files import LinearShapes, tensor_key
from coserve.models.config import HEAD_MODULE


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`modules` has for each module that is adapted, by number, A [L, r, K] and B, transposed and times its
    scale [L, r, N]; r is the module's largest rank, what a layer has less is zero. `head` has the head's,
    without L. `ranks_LM` is int32 [L, modules], 0 where there is nothing. `nbytes` are its bytes."""

    digest: str
    rank: int
    ranks_LM: torch.Tensor
    modules: dict[int, tuple[torch.Tensor, torch.Tensor]]
    head: tuple[torch.Tensor, torch.Tensor] | None
    nbytes: int


def pack(adapter: HostAdapter, model: LinearShapes, dtype: torch.dtype) -> PackedAdapter:
    """The rows of an adapter that is in memory."""
    return _pack(adapter.digest, adapter.rank, adapter.modules.items(), model, dtype)


def load_packed(
    path: str | Path,
    model: LinearShapes,
    dtype: torch.dtype,
    *,
    digest: str,
    max_rows: int,
    base_head: PackedLinear | None = None,
) -> PackedAdapter:
    """Check and load the PEFT directory of the version `digest`.

    Raises what `load_adapter` does, and FailedPrecondition when the files aren't that version's (any more) or
    its rank is over `max_rows`.
    """
    info, tensors = read_tensors(path, model, None, base_head=base_head)
    if info.digest != digest:
        raise FailedPrecondition(
            "The adapter's files have changed since it was published; publish them as a new version.",
            param="model",
        )
    if info.rank > max_rows:
        raise FailedPrecondition(
            f"The adapter's rank {info.rank} is over the {max_rows} rows that this server has for adapters; "
            "raise --max-lora-rank or --max-loras.",
            param="model",
        )
    weights = (
        (
            place,
            ModuleWeights(*(tensors[tensor_key(model.module_path(*place), side)] for side in "AB"), m.scale),
        )
        for place, m in info.modules.items()
    )
    return _pack(digest, info.rank, weights, model, dtype)


def _pack(
    digest: str,
    rank: int,
    weights: Iterable[tuple[tuple[int, str], ModuleWeights]],
    model: LinearShapes,
    dtype: torch.dtype,
) -> PackedAdapter:
    numbers = {name: number for number, name in enumerate(model.linear_modules)}
    ranks_LM = torch.zeros(model.num_layers, len(numbers), dtype=torch.int32)
    found: dict[str, list[tuple[int, ModuleWeights]]] = {}
    for (layer, name), module in weights:
        found.setdefault(name, []).append((layer, module))
        if name != HEAD_MODULE:
            ranks_LM[layer, numbers[name]] = len(module.a_RK)
    packed = {name: _module(name, of_layers, model, dtype) for name, of_layers in found.items()}
    nbytes = sum(a.nbytes + b.nbytes for a, b in packed.values())
    head = packed.pop(HEAD_MODULE, None)
    return PackedAdapter(
        digest=digest,
        rank=rank,
        ranks_LM=ranks_LM,
        modules={numbers[name]: pair for name, pair in packed.items()},
        head=(head[0][0], head[1][0]) if head is not None else None,
        nbytes=nbytes,
    )


def _module(
    name: str, of_layers: list[tuple[int, ModuleWeights]], model: LinearShapes, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [L, r, K] and B [L, r, N] of one module; of the head's with L = 1."""
    is_head = name == HEAD_MODULE
    outputs, inputs = model.module_shape(name)
    rank, layers = max(len(m.a_RK) for _, m in of_layers), 1 if is_head else model.num_layers
    a_LRK = torch.zeros(layers, rank, inputs, dtype=dtype)
    b_LRN = torch.zeros(layers, rank, outputs, dtype=dtype)
    for layer, module in of_layers:
        place = 0 if is_head else layer
        a_LRK[place, : len(module.a_RK)] = module.a_RK
        b_LRN[place, : len(module.a_RK)] = (module.b_NR.float() * module.scale).t()
    if not (_is_finite(a_LRK) and _is_finite(b_LRN)):
        whole = a_LRK.isfinite().flatten(1).all(1) & b_LRN.isfinite().flatten(1).all(1)
        layer = next(layer for layer, _ in of_layers if not whole[0 if is_head else layer])
        raise InvalidRequest(
            f"cannot load the adapter: {model.module_path(layer, name)} holds values that are not finite",
            param="lora_path",
        )
    return a_LRK, b_LRN


def _is_finite(tensor: torch.Tensor) -> bool:
    """By its largest value, which no comparison finds small where one isn't a number: in bf16 twenty times as
    fast as `isfinite`."""
    return bool(tensor.abs().max() < float("inf"))
