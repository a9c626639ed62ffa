"""The device rows that all adapters live in.

For each of the seven linear modules one tensor A [L, rows, K] and one tensor B [L, rows, N] (transposed,
multiplied by the scale). An adapter of rank r has r row numbers, the same in every module and layer; a module
with a smaller rank leaves the last of them zero. Which rows are whose is decided in core/adapter_slots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from coserve.lora.adapter import HostAdapter
from coserve.lora.peft_files import LINEAR_MODULES, LinearShapes


class PoolShapes(LinearShapes, Protocol):
    """What the pool needs of a model's configuration."""


@dataclass(frozen=True)
class ResidentAdapter:
    """Where an adapter lies: its pool `rows` int32 [rank] and each module's rank, `ranks_ML` int32
    [modules, L] (0 where a module isn't adapted)."""

    rows: torch.Tensor
    ranks_ML: torch.Tensor


class AdapterPool:
    """`max_rows` rows over all adapters, in the compute dtype. Zero at first; on the CPU untouched rows take
    no memory."""

    def __init__(
        self,
        config: PoolShapes,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_layers = config.num_layers
        self.max_rows = max_rows
        self.dtype = dtype
        shapes = [config.module_shape(name) for name in LINEAR_MODULES]
        make = {"dtype": dtype, "device": device}
        self._a = [torch.zeros(self.num_layers, max_rows, inputs, **make) for _, inputs in shapes]
        self._b = [torch.zeros(self.num_layers, max_rows, outputs, **make) for outputs, _ in shapes]
        self._resident: dict[str, ResidentAdapter] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._a, *self._b))

    def rows(self, module_index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [rows, K], b [rows, N]) of one module of one layer; views."""
        return self._a[module_index][layer], self._b[module_index][layer]

    def resident(self, key: str) -> ResidentAdapter:
        """Where the adapter `key` lies; KeyError when it isn't on the device."""
        return self._resident[key]

    def __contains__(self, key: str) -> bool:
        return key in self._resident

    def write(self, key: str, rows: Sequence[int], adapter: HostAdapter) -> None:
        """Copy an adapter into its rows and know it by `key` from then on.

        `rows` has as many entries as the adapter's rank; what a smaller module leaves is set to zero.
        """
        if len(rows) != adapter.rank:
            raise ValueError(f"{len(rows)} rows for an adapter of rank {adapter.rank}")
        ranks = torch.zeros(len(LINEAR_MODULES), self.num_layers, dtype=torch.int32)
        for module_index, name in enumerate(LINEAR_MODULES):
            for layer in range(self.num_layers):
                weights = adapter.modules.get((layer, name))
                if weights is not None:
                    ranks[module_index, layer] = len(weights.a_RK)
        self.place(key, rows, ranks)
        for (layer, name), weights in adapter.modules.items():
            scaled_b_RN = weights.b_NR.t() * weights.scale
            self.write_module(key, LINEAR_MODULES.index(name), layer, weights.a_RK, scaled_b_RN)

    def place(self, key: str, rows: Sequence[int], ranks_ML: torch.Tensor) -> None:
        """Clear `rows` and give them to `key`, whose modules are then written one by one."""
        where = torch.tensor(list(rows), dtype=torch.int32)
        for tensor in (*self._a, *self._b):
            tensor[:, where.long()] = 0
        self._resident[key] = ResidentAdapter(where, ranks_ML.to(torch.int32))

    def write_module(
        self, key: str, module_index: int, layer: int, a_RK: torch.Tensor, scaled_b_RN: torch.Tensor
    ) -> None:
        """Write one module's A [r, K] and B, transposed and times its scale [r, N]; cast to `dtype`."""
        where = self._resident[key].rows[: len(a_RK)].long()
        self._a[module_index][layer, where] = a_RK.to(self._a[module_index])
        self._b[module_index][layer, where] = scaled_b_RN.to(self._b[module_index])

    def forget(self, key: str) -> None:
        """The adapter is no longer here: its rows are cleared when they are given away again."""
        self._resident.pop(key, None)
