"""The adapter in training: fp32 masters and gradients in two flat buffers, and its rows in the pool.

    y += s x A^T B^T,   A [r, in] from U(-1/sqrt(in), 1/sqrt(in)), B [out, r] zero

as PEFT starts it (Kaiming-uniform with a = sqrt 5; "gaussian": A from N(0, 1/r^2)). B lies transposed in the
buffer, as the pool's rows do. The pool's rows carry s B, so a gradient found there is that of B once
multiplied by s (`finish_gradients`). With `freeze_a` (LoRA-FA, Zhang et al. 2023) A stays as it started: it
lies outside the buffers and has no gradient and no moments.

The head counts as module 0 of a layer above the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from coserve.errors import InvalidRequest
from coserve.kernels.dropout import Dropout, module_salt
from coserve.kernels.linear import PackedLinear
from coserve.kernels.lora import ModuleGradient
from coserve.layers.batch import LoraPool
from coserve.layers.pieces import Pieces, whole
from coserve.lora.adapter import load_adapter
from coserve.lora.peft_files import tensor_key
from coserve.models.config import HEAD_MODULE, ModelConfig
from coserve.training.job import LoraSpec
from coserve.training.lora_settings import peft_config, resolve_lora


class WritablePool(LoraPool, Protocol):
    """The part of lora/adapter_pool.py that a training adapter writes through."""

    def place(self, rows: Sequence[int], ranks_LM: torch.Tensor) -> None: ...

    def write_module(
        self, rows: Sequence[int], module: int, layer: int, a_RK: torch.Tensor, scaled_b_RN: torch.Tensor
    ) -> None: ...

    def write_head(self, rows: Sequence[int], a_RK: torch.Tensor, scaled_b_RN: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class TrainableModule:
    """One adapted linear: views of the masters (a_RK, b_RN = B transposed) and of their gradients, `da_RK`
    None where A is frozen."""

    layer: int
    module: int
    path: str
    rank: int
    scale: float
    a_RK: torch.Tensor
    b_RN: torch.Tensor
    da_RK: torch.Tensor | None
    db_RN: torch.Tensor


class _Cutter:
    """Hands out consecutive matrices of a flat tensor."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat
        self._end = 0

    def take(self, rows: int, columns: int) -> torch.Tensor:
        begin, self._end = self._end, self._end + rows * columns
        return self._flat[begin : self._end].view(rows, columns)


class TrainableAdapter:
    """`parameters` and `gradients` are flat fp32 tensors of all that is trained, layer by layer; `frozen`
    holds the masters that aren't."""

    def __init__(
        self,
        spec: LoraSpec,
        config: ModelConfig,
        seed: int,
        *,
        base_model_name: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        """A new adapter drawn from `seed`. Raises InvalidRequest as `resolve_lora` does."""
        resolved = resolve_lora(spec, config)
        self.config = peft_config(spec, config, base_model_name)
        numbers = {HEAD_MODULE: 0, **{name: number for number, name in enumerate(config.linear_modules)}}
        places = [
            (layer, numbers[name], path, config.module_shape(name))
            for path, (layer, name) in config.adapter_places.items()
            if resolved.targets(path, layer)
        ]
        a_sizes = [resolved.rank(path) * into for _, _, path, (_, into) in places]
        b_sizes = [resolved.rank(path) * out for _, _, path, (out, _) in places]
        frozen, trained = (sum(a_sizes), 0) if spec.freeze_a else (0, sum(a_sizes))
        self.frozen = torch.zeros(frozen, dtype=torch.float32, device=device)
        self.parameters = torch.zeros(trained + sum(b_sizes), dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        self._kept: torch.Tensor | None = None  # gradients after a microbatch of this step
        self.ranks_LM = torch.zeros(config.num_layers, len(config.linear_modules), dtype=torch.int32)
        self.modules: list[TrainableModule] = []
        parameters, gradients, frozen_a = (
            _Cutter(self.parameters),
            _Cutter(self.gradients),
            _Cutter(self.frozen),
        )
        for layer, module, path, (out, into) in places:
            rank = resolved.rank(path)
            masters = frozen_a if spec.freeze_a else parameters
            if layer < config.num_layers:
                self.ranks_LM[layer, module] = rank
            self.modules.append(
                TrainableModule(
                    layer,
                    module,
                    path,
                    rank,
                    resolved.scale(path),
                    a_RK=masters.take(rank, into),
                    b_RN=parameters.take(rank, out),
                    da_RK=None if spec.freeze_a else gradients.take(rank, into),
                    db_RN=gradients.take(rank, out),
                )
            )
        self._by_layer: dict[int, list[TrainableModule]] = {}
        for trainable in self.modules:
            self._by_layer.setdefault(trainable.layer, []).append(trainable)
        self._head = next(iter(self._by_layer.get(config.num_layers, ())), None)
        self._draw(seed, spec.init_lora_weights)

    @property
    def rank(self) -> int:
        """The largest rank of its modules: how many pool rows it needs."""
        return max(module.rank for module in self.modules)

    @property
    def adapts_head(self) -> bool:
        """One of its modules sits on lm_head."""
        return self._head is not None

    @property
    def lowest_layer(self) -> int:
        """The lowest layer with an adapter; no backward goes below it. The number of layers where only the
        head has one."""
        return min(self._by_layer)

    @property
    def nbytes(self) -> int:
        """Bytes of masters and gradients."""
        kept = 0 if self._kept is None else self._kept.nbytes
        return self.parameters.nbytes + self.gradients.nbytes + self.frozen.nbytes + kept

    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, "A" or "B") of every trained tensor in the flat buffers, in their order."""
        named = [(view, kind) for m in self.modules for view, kind in ((m.da_RK, "A"), (m.db_RN, "B"))]
        found = [(view.storage_offset(), view.numel(), kind) for view, kind in named if view is not None]
        return [(start, start + count, kind) for start, count, kind in found]

    def _draw(self, seed: int, init: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules:
            shape = module.a_RK.shape
            if init == "gaussian":
                drawn = torch.randn(shape, generator=generator).div_(module.rank)
            else:
                bound = shape[1] ** -0.5
                drawn = torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
            module.a_RK.copy_(drawn)

    # ------------------------------------------------------------------ gradients

    def zero_gradients(self) -> None:
        """Before the first backward unit of an optimizer step."""
        self.gradients.zero_()
        self._kept = None

    def keep_gradients(self) -> None:
        """Remember the gradients as they are, for `restore_gradients`."""
        self._kept = self.gradients.clone() if self._kept is None else self._kept.copy_(self.gradients)

    def restore_gradients(self) -> None:
        """As they were when they were kept last; nothing where they weren't in this optimizer step."""
        if self._kept is not None:
            self.gradients.copy_(self._kept)

    def layer_gradients(
        self, pool: LoraPool, rows: torch.Tensor, layer: int, dropout: Dropout | None = None
    ) -> dict[int, ModuleGradient]:
        """Module number -> weights and sums for one layer's backward; `rows` int32 are the pool's, `dropout`
        is that of the window's tokens."""
        return {
            m.module: ModuleGradient(
                *pool.rows(m.module, layer),
                rows[: m.rank],
                m.da_RK,
                m.db_RN,
                dropout and dropout.salted(module_salt(layer, m.module)),
            )
            for m in self._by_layer.get(layer, ())
        }

    def head_gradient(
        self, pool: LoraPool, rows: Sequence[int], dropout: Dropout | None = None
    ) -> ModuleGradient | None:
        """Weights and sums of the head's adapter, None where there is none; `dropout` is that of the tokens
        at hand."""
        m, head = self._head, pool.head(rows)
        if m is None or head is None:
            return None
        own = torch.arange(m.rank, dtype=torch.int32, device=head.a_RK.device)
        drop = dropout and dropout.salted(module_salt(m.layer, m.module))
        return ModuleGradient(*head, own, m.da_RK, m.db_RN, drop)

    def finish_gradients(self) -> None:
        """After the last backward unit of an optimizer step, once: from the scaled B's gradient to B's."""
        for module in self.modules:
            module.db_RN.mul_(module.scale)

    # ------------------------------------------------------------------ rows

    def place(self, pool: WritablePool, rows: Sequence[int]) -> None:
        """Take `rows` (as many as `rank`) of the pool and write the weights there."""
        pool.place(rows, self.ranks_LM)
        self.write_rows(pool, rows)

    def write_rows(self, pool: WritablePool, rows: Sequence[int]) -> None:
        """Masters -> the pool's rows in the compute dtype, after each optimizer step."""
        whole(self.write_pieces(pool, rows))

    def write_pieces(self, pool: WritablePool, rows: Sequence[int]) -> Pieces[None]:
        """As `write_rows`, a layer at a time."""
        for modules in self._by_layer.values():
            for m in modules:
                scaled_b_RN = m.b_RN * m.scale
                if m is self._head:
                    pool.write_head(rows, m.a_RK, scaled_b_RN)
                else:
                    pool.write_module(rows, m.module, m.layer, m.a_RK, scaled_b_RN)
            yield

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """PEFT's key -> fp32 master, A [r, in] and B [out, r]; views."""
        named = {}
        for module in self.modules:
            named[tensor_key(module.path, "A")] = module.a_RK
            named[tensor_key(module.path, "B")] = module.b_RN.t()
        return named

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the masters from PEFT's tensors. Raises InvalidRequest when names or shapes differ."""
        own = self.tensors()
        reasons = [f"it has no {key}" for key in sorted(own.keys() - tensors.keys())]
        reasons += [f"it has {key}" for key in sorted(tensors.keys() - own.keys())]
        reasons += [
            f"its {key} has shape {list(tensors[key].shape)}, not {list(master.shape)}"
            for key, master in own.items()
            if key in tensors and master.shape != tensors[key].shape
        ]
        if reasons:
            more = f" (and {len(reasons) - 1} more tensors)" if len(reasons) > 1 else ""
            raise InvalidRequest(
                f"the adapter to start from differs from the job's modules and ranks: {reasons[0]}{more}",
                param="init_from",
            )
        for key, master in own.items():
            master.copy_(tensors[key])

    def start_from(
        self, directory: str | Path, model: ModelConfig, base_head: PackedLinear | None = None
    ) -> None:
        """Set the masters from a PEFT directory. As in PEFT the scale is the job's: with another alpha the
        same weights start out as another function.

        Raises InvalidRequest when its modules or ranks differ, NotFound when there is none.
        """
        given = load_adapter(directory, model, base_head=base_head, param="init_from")
        tensors = {}
        for place, weights in given.modules.items():
            path = model.module_path(*place)
            tensors[tensor_key(path, "A")] = weights.a_RK
            tensors[tensor_key(path, "B")] = weights.b_NR
        self.load(tensors)
