from __future__ import annotations

import pytest
import torch

from coserve.kernels.lora import (
    LoraGroup,
    LoraModule,
    LoraSegments,
    ModuleGradient,
    lora_backward,
    lora_forward_,
)
from tests.kernels.lora_cases import POOL, gradients, in_windows, pool, segments
from tests.kernels.oracle import DTYPES, check, error, ints, lora_backward_one, lora_forward_one_

SPLIT = 1e-5  # with bf16 inputs h and dh may be factors of 16 bits in da and db, 2^-17 from their fp32 value
SHAPES = [(16, 16), (33, 50), (1, 1), (128, 96), (200, 257)]


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_matches_float64(isa: str, N: int, K: int, dtype: torch.dtype) -> None:
    spans, ranks = segments((0, 1, 1), (1, 4, 64), (4, 4, 8), (6, 27, 16), (27, 30, 0), (30, 35, 3))
    a, b = pool(N, K, dtype)
    y, x = torch.randn(40, N).to(dtype), torch.randn(40, K).to(dtype)

    def peer(y, x, a, b):  # type: ignore[no-untyped-def]
        """As torch's bf16 has it, h rounded like every product."""
        bounds = zip(spans.token_start, spans.token_end, spans.row_offset, ranks, strict=True)
        for start, end, offset, rank in bounds:
            rows = spans.rows[offset : offset + rank].long()
            y[start:end] = y[start:end].float() + ((x[start:end] @ a[rows].t()) @ b[rows]).float()
        return (y,)

    check(lambda *t: (lora_forward_one_(*t, spans, ranks),), y, x, a, b, peer=peer)


def test_forward_writes_only_its_columns_and_tokens(isa: str) -> None:
    spans, ranks = segments((1, 3, 4))
    a, b = pool(20, 16, torch.float32)
    merged, x = torch.zeros(5, 60), torch.randn(5, 16)
    lora_forward_one_(merged[:, 20:40], x, a, b, spans, ranks)
    assert merged[1:3, 20:40].abs().min() > 0
    merged[1:3, 20:40] = 0
    assert not merged.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_row_does_not_depend_on_its_batch(isa: str, dtype: torch.dtype) -> None:
    a, b = pool(70, 90, dtype)
    spans, ranks = segments((0, 50, 19))
    y, x = torch.randn(50, 70).to(dtype), torch.randn(50, 90).to(dtype)
    whole = lora_forward_one_(y.clone(), x, a, b, spans, ranks)
    for size in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        parts = []
        for at in range(0, 50, size):
            end = min(size, 50 - at)
            part = LoraSegments(ints(0), ints(end), spans.row_offset, spans.rows)
            rows = slice(at, at + size)
            parts.append(lora_forward_one_(y[rows].clone(), x[rows], a, b, part, ranks))
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_row_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    """Among segments of other adapters and modules of other ranks, on either side of the product."""
    widths, K, ranks = (70, 1100), 90, ints(64, 8, 19, 1, 33).repeat(2, 1)
    modules, column = [], 0
    for line, width in enumerate(widths):
        modules.append(LoraModule(*pool(width, K, dtype), column, line))
        column += width
    group = LoraGroup(modules)
    starts, ends, offsets = (0, 3, 4, 13, 20), (3, 4, 13, 20, 29), (0, 64, 72, 91, 92)
    rows = torch.randperm(POOL)[: int(ranks[0].sum())].int()
    spans = LoraSegments(ints(*starts), ints(*ends), ints(*offsets), rows)
    y, x = torch.randn(30, column).to(dtype), torch.randn(30, K).to(dtype)
    whole = lora_forward_(y.clone(), x, group, spans, ranks)
    assert torch.equal(whole[29], y[29]) and not torch.equal(whole[:29], y[:29])
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for t in range(start, end):
            one = LoraSegments(ints(0), ints(1), ints(0), rows[offsets[s] :].contiguous())
            alone = lora_forward_(
                y[t : t + 1].clone(), x[t : t + 1], group, one, ranks[:, s : s + 1].contiguous()
            )
            assert torch.equal(alone[0], whole[t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_backward_is_that_of_its_modules(isa: str, dtype: torch.dtype) -> None:
    """da and db to the bit; dx, rounded once instead of after every module, within the rounding."""
    widths, K, T, rank = (40, 16, 300), 70, 130, (8, 1, 33)
    dy, x = torch.randn(T, sum(widths)).to(dtype), torch.randn(T, K).to(dtype)
    merged, single, column = [], [], 0
    for width, r in zip(widths, rank, strict=True):
        a, b = pool(width, K, dtype)
        rows = torch.randperm(POOL)[:r].int()
        for made in (merged, single):
            made.append(ModuleGradient(a, b, rows, torch.zeros(r, K), torch.zeros(r, width), None, column))
        column += width
    dx, apart = torch.zeros(T, K).to(dtype), torch.zeros(T, K).to(dtype)
    lora_backward(dy, x, merged, dx, 10)
    for module in single:
        lora_backward(dy, x, [module], apart, 10)
    for one, other in zip(merged, single, strict=True):
        assert torch.equal(one.da_rK, other.da_rK) and torch.equal(one.db_rN, other.db_rN)
    assert error(dx, apart.double()) < (1e-6 if dtype == torch.float32 else 2**-7)
    assert dx.abs().min(1).values.max() > 0


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "rank", "offset"), [(1, 1, 0), (64, 8, 0), (130, 64, 0), (70, 5, 60)])
def test_backward_matches_float64(
    isa: str, N: int, K: int, dtype: torch.dtype, T: int, rank: int, offset: int
) -> None:
    a, b = pool(N, K, dtype)
    rows = torch.randperm(POOL)[:rank].int()
    dy, x, dx = (torch.randn(T, size).to(dtype) for size in (N, K, K))

    def peer(dy, x, a, b, dx):  # type: ignore[no-untyped-def]
        """As torch's bf16 has it, dh rounded like every product."""
        picked = rows.long()
        return ((dx.float() + ((dy @ b[picked].t()) @ a[picked]).float()).to(dx.dtype),)

    check(lambda *t: gradients(*t, rows, offset)[:1], dy, x, a, b, dx, peer=peer)
    check(lambda *t: gradients(*t, rows, offset)[1:], dy, x, a, b, dx, low_slack=SPLIT)


def test_backward_matches_autograd(isa: str) -> None:
    a, b = pool(24, 40, torch.float32)
    rows, x, dy = ints(7, 3, 90), torch.randn(100, 40), torch.randn(100, 24)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (x, a[rows.long()], b[rows.long()])]
        wants = torch.autograd.grad(leaves[0] @ leaves[1].t() @ leaves[2], leaves, dy.double())
    dx, da, db = torch.zeros(100, 40), torch.zeros(3, 40), torch.zeros(3, 24)
    lora_backward_one(dy, x, a, b, rows, dx, da, db, 0)
    for got, want in zip((dx, da, db), wants, strict=True):
        assert error(got, want) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_cuts(isa: str, dtype: torch.dtype) -> None:
    T, N, K = 300, 50, 70
    a, b = pool(N, K, dtype)
    rows = torch.randperm(POOL)[:9].int()
    dy, x = torch.randn(T, N).to(dtype), torch.randn(T, K).to(dtype)
    case = dy, x, a, b, rows
    whole = in_windows(T, *case)
    for cut in (64, 128):
        assert all(torch.equal(p, q) for p, q in zip(in_windows(cut, *case), whole, strict=True))
    for cut in (1, 7):
        dx, da, db = in_windows(cut, *case)
        assert torch.equal(dx, whole[0])
        assert max(error(da, whole[1].double()), error(db, whole[2].double())) < 2e-6


def test_threads_change_no_bit() -> None:
    T, N, K, rank = 300, 190, 150, 32
    a, b = pool(N, K, torch.float32)
    spans, ranks = segments((0, 7, 8), (7, 300, rank))
    rows, x, dy = torch.arange(rank).int(), torch.randn(T, K), torch.randn(T, N)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = lora_forward_one_(torch.zeros(T, N), x, a, b, spans, ranks)
        dx, da, db = torch.zeros(T, K), torch.zeros(rank, K), torch.zeros(rank, N)
        lora_backward_one(dy, x, a, b, rows, dx, da, db, 0)
        results.append((y, dx, da, db))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_wrong_input_is_refused() -> None:
    a, b = pool(16, 8, torch.float32)
    spans, ranks = segments((0, 2, 4))
    with pytest.raises(ValueError, match="ranks"):
        lora_forward_one_(torch.zeros(2, 16), torch.zeros(2, 8), a, b, spans, ranks.long())
    with pytest.raises(ValueError, match="a and b"):
        lora_forward_one_(torch.zeros(2, 16), torch.zeros(2, 9), a, b, spans, ranks)
    with pytest.raises(ValueError, match="da must be contiguous fp32"):
        da, db = torch.zeros(1, 8).bfloat16(), torch.zeros(1, 16)
        lora_backward_one(torch.zeros(2, 16), torch.zeros(2, 8), a, b, ints(1), torch.zeros(2, 8), da, db, 0)
