"""Merged linears with adapters on column slices, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.lora import LoraGroup, LoraModule, LoraSegments, ModuleGradient
from coserve.layers.batch import LoraBatch
from coserve.layers.linear import AdaptedLinear

Q_PROJ, K_PROJ, V_PROJ = range(3)
SIZES = {Q_PROJ: 12, K_PROJ: 5, V_PROJ: 7}
INPUT, POOL_ROWS = 9, 6


class Pool:
    """Random rows for the three modules."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = {m: torch.randn(POOL_ROWS, INPUT, generator=generator) for m in SIZES}
        self.b = {m: torch.randn(POOL_ROWS, n, generator=generator) for m, n in SIZES.items()}

    def rows(self, module: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a[module], self.b[module]

    def group(self, parts: tuple[tuple[int, int], ...], layer: int) -> LoraGroup:
        return LoraGroup([LoraModule(*self.rows(m, layer), column, m) for m, column in parts])


@pytest.fixture
def merged() -> tuple[AdaptedLinear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, INPUT, generator=generator) for n in SIZES.values()]
    biases = [torch.randn(n, generator=generator) for n in SIZES.values()]
    return AdaptedLinear(list(SIZES), weights, biases), torch.cat(weights), torch.cat(biases)


def test_every_row_gets_its_own_adapter(merged: tuple[AdaptedLinear, torch.Tensor, torch.Tensor]) -> None:
    linear, weight, bias = merged
    pool = Pool()
    x_TK = torch.randn(8, INPUT, generator=torch.Generator().manual_seed(2))
    # Tokens 1-3 use rows 4, 0 (rank 1 in k_proj, v_proj not adapted); tokens 5-7 rows 2, 3, 5.
    segments = LoraSegments(
        *(torch.tensor(v, dtype=torch.int32) for v in ([1, 5], [4, 8], [0, 2], [4, 0, 2, 3, 5]))
    )
    ranks = torch.zeros(1, 7, 2, dtype=torch.int32)
    ranks[0, Q_PROJ], ranks[0, K_PROJ], ranks[0, V_PROJ] = (torch.tensor(r) for r in ([2, 3], [1, 3], [0, 3]))
    ours = linear.forward(x_TK, LoraBatch(segments, ranks, pool), 0)
    expected = x_TK.double() @ weight.double().t() + bias.double()
    for tokens, rows in ((slice(1, 4), [4, 0]), (slice(5, 8), [2, 3, 5])):
        for segment, (module, columns) in [(int(tokens.start > 1), part) for part in linear.parts]:
            used = rows[: int(ranks[0, module, segment])]
            a, b = pool.a[module][used].double(), pool.b[module][used].double()
            expected[tokens, columns] += x_TK[tokens].double() @ a.t() @ b
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def test_backward_is_that_of_the_adapted_modules(
    merged: tuple[AdaptedLinear, torch.Tensor, torch.Tensor],
) -> None:
    linear, weight, _ = merged
    pool = Pool()
    generator = torch.Generator().manual_seed(3)
    x_WK, dy_WN = torch.randn(70, INPUT, generator=generator), torch.randn(70, 24, generator=generator)
    rows = torch.tensor([5, 1], dtype=torch.int32)
    gradients = {
        m: ModuleGradient(pool.a[m], pool.b[m], rows, torch.zeros(2, INPUT), torch.zeros(2, SIZES[m]))
        for m in (Q_PROJ, V_PROJ)
    }
    dx_WK = linear.backward(dy_WN, lambda: x_WK, gradients, 0)
    expected = dy_WN.double() @ weight.double()
    for module, columns in linear.parts:
        if module not in gradients:
            continue
        a, b = pool.a[module][[5, 1]].double(), pool.b[module][[5, 1]].double()
        dy, x, found = dy_WN[:, columns].double(), x_WK.double(), gradients[module]
        expected += dy @ b.t() @ a
        torch.testing.assert_close(found.da_rK.double(), (dy @ b.t()).t() @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.db_rN.double(), (x @ a.t()).t() @ dy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx_WK.double(), expected, rtol=1e-5, atol=1e-4)


def test_input_is_not_recomputed_where_no_adapter_reads_it(
    merged: tuple[AdaptedLinear, torch.Tensor, torch.Tensor],
) -> None:
    linear, weight, _ = merged
    asked = []
    dx_WK = linear.backward(torch.ones(3, 24), lambda: asked.append(1), {}, 0)
    assert not asked
    torch.testing.assert_close(dx_WK, torch.ones(3, 24) @ weight, rtol=1e-5, atol=1e-5)
