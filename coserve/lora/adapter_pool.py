"""The device rows that all adapters live in.

For each linear module of the model one tensor A [L, rows, K] and one tensor B [L, rows, N] (transposed,
multiplied by the scale). An adapter of rank r has r row numbers, the same in every module and layer; a module
with a smaller rank leaves the last of them zero. Which rows are whose is decided in core/adapter_slots.py.

The head's B has a column for every word, so an adapter on `lm_head` brings tensors of its own: memory for the
head is there for those adapters alone, as long as they are.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from math import prod

import torch

from coserve.kernels.dropout import module_salt
from coserve.kernels.lora import LoraGroup, LoraModule
from coserve.layers.batch import HeadAdapter
from coserve.lora.adapter import HostAdapter
from coserve.lora.packed_adapter import PackedAdapter, pack
from coserve.lora.peft_files import LinearShapes

PIECE_BYTES = 1 << 20  # copied between two places where writing an adapter may rest


class AdapterPool:
    """`max_rows` rows over all adapters, in the compute dtype. Zero at first; on the CPU untouched rows take
    no memory."""

    def __init__(
        self,
        config: LinearShapes,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config = config
        self.num_layers = config.num_layers
        self.num_modules = len(config.linear_modules)
        self.max_rows = max_rows
        self.dtype = dtype
        self._modules = {name: number for number, name in enumerate(config.linear_modules)}
        shapes = [config.module_shape(name) for name in self._modules]
        sizes = (self.num_layers, max_rows)
        self._a = [_zeros((*sizes, inputs), dtype, device) for _, inputs in shapes]
        self._b = [_zeros((*sizes, outputs), dtype, device) for outputs, _ in shapes]
        self._ranks: dict[int, torch.Tensor] = {}  # by an adapter's first row
        self._placed: dict[int, int] = {}  # likewise: which placement it was
        self._heads: dict[int, HeadAdapter] = {}  # likewise
        self._dirty: list[set[int]] = [set() for _ in shapes]  # by module: rows that may not be zero
        self.placements = 0  # counts them
        self._groups: dict[tuple[tuple[tuple[int, int], ...], int], LoraGroup] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, used or not, and of the heads there are."""
        return self.bytes_of(self.max_rows)

    def bytes_of(self, rows: int) -> int:
        """Bytes of so many rows, and of the heads there are."""
        heads = sum(head.nbytes for head in self._heads.values())
        return sum(tensor.nbytes for tensor in (*self._a, *self._b)) // self.max_rows * rows + heads

    def rows(self, module: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [rows, K], b [rows, N]) of the module numbered `module` in one layer; views."""
        return self._a[module][layer], self._b[module][layer]

    def group(self, parts: tuple[tuple[int, int], ...], layer: int) -> LoraGroup:
        """The modules of a merged product in one layer, by number and first column of the product; the line
        of a module in a table of ranks is its number."""
        found = self._groups.get((parts, layer))
        if found is None:
            modules = [
                LoraModule(*self.rows(module, layer), column, module, module_salt(layer, module))
                for module, column in parts
            ]
            found = self._groups[parts, layer] = LoraGroup(modules)
        return found

    def ranks(self, rows: Sequence[int]) -> torch.Tensor:
        """int32 [L, modules]: the rank that the adapter in `rows` has in each module, 0 where it has none.

        KeyError when nothing was placed there: an adapter that isn't loaded must never pass for the base.
        """
        return self._ranks[rows[0]]

    def placement(self, rows: Sequence[int]) -> int:
        """Number of the placement that put the adapter into `rows`: another adapter, or other rows, have
        another. So tables made of rows and ranks can tell that they are old."""
        return self._placed[rows[0]]

    def head(self, rows: Sequence[int]) -> HeadAdapter | None:
        """What the adapter in `rows` adds to the head; None where it leaves the head alone."""
        return self._heads.get(rows[0])

    def write(self, rows: Sequence[int], adapter: HostAdapter) -> None:
        """Copy an adapter into `rows`, as many as its rank; what a smaller module leaves is set to zero."""
        for _ in self.write_pieces(rows, pack(adapter, self._config, self.dtype)):
            pass

    def write_pieces(self, rows: Sequence[int], adapter: PackedAdapter) -> Iterator[int]:
        """As `write`, a few layers of a module at a time; yields the bytes of each piece. Nobody can read the
        rows before the end."""
        if len(rows) != adapter.rank:
            raise ValueError(f"{len(rows)} rows for an adapter of rank {adapter.rank}")
        self._vacate(rows)
        for module, (pool_a, pool_b) in enumerate(zip(self._a, self._b, strict=True)):
            a_LRK, b_LRN = adapter.modules.get(module, (None, None))
            if a_LRK is None and self._dirty[module].isdisjoint(rows):
                continue
            filled = rows[: 0 if a_LRK is None else a_LRK.shape[1]]
            self._dirty[module].update(filled)
            for pool, weights in ((pool_a, a_LRK), (pool_b, b_LRN)):
                step = max(1, PIECE_BYTES // (len(rows) * pool.shape[2] * pool.itemsize))
                for layer in range(0, self.num_layers, step):
                    layers = slice(layer, layer + step)
                    yield _fill(pool[layers], rows, None if weights is None else weights[layers])
            self._dirty[module].difference_update(rows[len(filled) :])
        if adapter.head is not None:
            self.write_head(rows, *adapter.head)
            yield self._heads[rows[0]].nbytes
        self._settle(rows, adapter.ranks_LM)

    def place(self, rows: Sequence[int], ranks_LM: torch.Tensor) -> None:
        """Clear `rows` for an adapter with these ranks [L, modules], whose modules are then written."""
        self.clear(rows)
        self._settle(rows, ranks_LM)

    def write_module(
        self, rows: Sequence[int], module: int, layer: int, a_RK: torch.Tensor, scaled_b_RN: torch.Tensor
    ) -> None:
        """Write one module's A [r, K] and B, transposed and times its scale [r, N]; cast to `dtype`."""
        pool_a, pool_b = self.rows(module, layer)
        where = torch.tensor(rows[: len(a_RK)], dtype=torch.int64, device=pool_a.device)
        self._dirty[module].update(rows[: len(a_RK)])
        pool_a[where] = a_RK.to(pool_a)
        pool_b[where] = scaled_b_RN.to(pool_b)

    def write_head(self, rows: Sequence[int], a_RK: torch.Tensor, scaled_b_RN: torch.Tensor) -> None:
        """Write what the adapter in `rows` adds to the head, A [r, H] and B [r, V] as in `write_module`."""
        head = self._heads.get(rows[0])
        if head is None:
            like = self._a[0]
            head = HeadAdapter(like.new_empty(a_RK.shape), like.new_empty(scaled_b_RN.shape))
            self._heads[rows[0]] = head
        head.a_RK.copy_(a_RK)
        head.b_RN.copy_(scaled_b_RN)

    def free_heads(self, rows: Sequence[int]) -> None:
        """The adapter in `rows` is gone: its part of the head goes at once, its rows when they are reused."""
        for row in rows:
            self._heads.pop(row, None)

    def clear(self, rows: Sequence[int]) -> None:
        """Set `rows` to zero: nobody's adapter is in them."""
        self._vacate(rows)
        for module, (pool_a, pool_b) in enumerate(zip(self._a, self._b, strict=True)):
            if not self._dirty[module].isdisjoint(rows):
                _fill(pool_a, rows, None)
                _fill(pool_b, rows, None)
                self._dirty[module].difference_update(rows)

    def _settle(self, rows: Sequence[int], ranks_LM: torch.Tensor) -> None:
        self.placements += 1
        self._ranks[rows[0]], self._placed[rows[0]] = ranks_LM.to(torch.int32), self.placements

    def _vacate(self, rows: Sequence[int]) -> None:
        self.free_heads(rows)
        for row in rows:
            self._ranks.pop(row, None)


def _fill(pool_LRX: torch.Tensor, rows: Sequence[int], weights_LrX: torch.Tensor | None) -> int:
    """Write weights into the first of `rows` and zeros into the others; returns the bytes written."""
    filled = 0 if weights_LrX is None else weights_LrX.shape[1]
    first, count = rows[0], len(rows)
    if rows[-1] - first == count - 1 and list(rows) == list(range(first, first + count)):
        own = pool_LRX[:, first : first + count]  # as fast as memory; rows here and there take twice as long
        if weights_LrX is not None:
            own[:, :filled].copy_(weights_LrX)
        own[:, filled:] = 0
    else:
        where = torch.tensor(rows, dtype=torch.int64, device=pool_LRX.device)
        if weights_LrX is not None:
            pool_LRX.index_copy_(1, where[:filled], weights_LrX.to(pool_LRX))
        pool_LRX.index_fill_(1, where[filled:], 0)
    return pool_LRX[:, :count].nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros; on a CPU the system's pages, which take no memory until they are written. torch writes them."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
