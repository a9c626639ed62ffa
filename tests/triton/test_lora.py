"""LoRA in the interpreter: against float64, by batches, cuts and parts, with and without dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coserve.kernels.dropout import Dropout, keep_mask, row_keys
from coserve.kernels.lora import LoraSegments
from coserve.kernels.triton import lora_backward as backward_file
from coserve.kernels.triton import lora_shrink as shrink_file
from tests.kernels.lora_cases import POOL, gradients, in_windows, pool, segments
from tests.kernels.oracle import INTERPRETED_DTYPES, check, error, ints, lora_backward_one, lora_forward_one_

SALT = -77 << 40
SPANS = ((0, 1, 1), (1, 4, 64), (4, 4, 8), (6, 47, 16), (47, 50, 0), (50, 56, 3))


def dropout(tokens: int, *rates: float) -> Dropout:
    keys = torch.from_numpy(row_keys(1, 2, 3, np.arange(tokens)))
    return Dropout(keys, torch.tensor(rates, dtype=torch.float64), SALT)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (140, 70)])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_forward(N: int, K: int, dtype: torch.dtype) -> None:
    spans, ranks = segments(*SPANS)
    a, b = pool(N, K, dtype)
    y, x = torch.randn(58, N).to(dtype), torch.randn(58, K).to(dtype)
    for drop in (None, dropout(58, 0.0, 0.3, 0.9, 0.5, 0.2, 0.7)):
        check(lambda y, x, a, b: (lora_forward_one_(y, x, a, b, spans, ranks, drop),), y, x, a, b)  # noqa: B023


def test_forward_of_one_token_at_rank_256_writes_nothing_else() -> None:
    spans, ranks = segments((2, 3, 256), (5, 5, 0), (5, 5, 0))
    a, b = pool(20, 16)
    merged, x = torch.zeros(5, 60), torch.randn(5, 16)
    view = merged[:, 20:40]
    lora_forward_one_(view, x, a, b, spans, ranks)
    rows = spans.rows.long()
    assert error(view[2], x[2].double() @ a[rows].double().t() @ b[rows].double()) < 2e-6
    view[2] = 0
    assert not merged.any()


def test_a_token_depends_neither_on_its_batch_nor_on_who_adds_up_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shrink_file, "PART", 64)
    K, N = 150, 40
    a, b = pool(N, K)
    spans, ranks = segments((0, 40, 19))
    y, x = torch.randn(40, N), torch.randn(40, K)
    whole = lora_forward_one_(y.clone(), x, a, b, spans, ranks)
    for at, end in ((0, 1), (3, 20), (7, 40)):
        part = LoraSegments(ints(0), ints(end - at), spans.row_offset, spans.rows)
        assert torch.equal(lora_forward_one_(y[at:end].clone(), x[at:end], a, b, part, ranks), whole[at:end])
    monkeypatch.setattr(shrink_file, "MANY_PROGRAMS", 0)
    assert torch.equal(lora_forward_one_(y.clone(), x, a, b, spans, ranks), whole)


@pytest.mark.parametrize(
    ("T", "N", "K", "rank", "offset"),
    [(1, 1, 1, 1, 0), (130, 70, 50, 64, 0), (70, 24, 90, 5, 60), (3, 20, 16, 256, 3)],
)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("rate", [None, 0.4], ids=["plain", "dropout"])
def test_backward(
    T: int, N: int, K: int, rank: int, offset: int, dtype: torch.dtype, rate: float | None
) -> None:
    a, b = pool(N, K, dtype)
    rows = torch.randperm(POOL)[:rank].int()
    dy, x, dx = (torch.randn(T, size).to(dtype) for size in (N, K, K))
    drop = None if rate is None else dropout(T, rate)
    check(lambda *tensors: gradients(*tensors, rows, offset, drop), dy, x, a, b, dx)


def test_backward_in_windows_and_with_parts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_file, "PART", 64)
    T, N, K = 150, 100, 30
    (a, b), rows = pool(N, K), torch.randperm(POOL)[:9].int()
    dy, x = torch.randn(T, N), torch.randn(T, K)
    case = dy, x, a, b, rows
    whole = in_windows(T, *case)
    assert all(torch.equal(p, q) for p, q in zip(in_windows(64, *case), whole, strict=True))
    dx, db = torch.zeros(T, K), torch.zeros(9, N)
    lora_backward_one(dy, x, a, b, rows, dx, None, db, 0)
    assert torch.equal(dx, whole[0]) and torch.equal(db, whole[2])
    monkeypatch.setattr(backward_file, "MANY_PROGRAMS", 0)
    assert all(torch.equal(p, q) for p, q in zip(in_windows(T, *case), whole, strict=True))


@pytest.mark.parametrize("rate", [1e-4, 0.5])
def test_masks_are_the_cpu_ones_to_the_bit(rate: float) -> None:
    """Through identities as A and B the forward shows its mask, and so does dx."""
    T, K = 19, 43
    drop, eye, ones = dropout(T, rate), torch.eye(K), torch.ones(T, K)
    mask = keep_mask(drop.keys_T, SALT, K, drop.rates_S[0])
    rows = torch.arange(K).int()
    own = LoraSegments(ints(0), ints(T), ints(0), rows)
    assert torch.equal(lora_forward_one_(torch.zeros(T, K), ones, eye, eye, own, ints(K), drop) != 0, mask)
    dx, _, _ = gradients(ones, ones, eye, eye, torch.zeros(T, K), rows, 0, drop)
    assert torch.equal(dx != 0, mask)


def test_rate_zero_is_no_dropout_to_the_bit() -> None:
    (a, b), spans = pool(24, 40), segments((0, 20, 3))
    x, dy, rows = torch.randn(20, 40), torch.randn(20, 24), ints(7, 3, 90)
    for first, second in zip(
        *(
            (lora_forward_one_(torch.zeros(20, 24), x, a, b, *spans, drop),)
            + gradients(dy, x, a, b, torch.zeros(20, 40), rows, 0, drop)
            for drop in (None, dropout(20, 0.0))
        ),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_nothing_to_do() -> None:
    (a, b), (spans, ranks) = pool(16, 8), segments((0, 0, 4))
    assert lora_forward_one_(torch.zeros(0, 16), torch.zeros(0, 8), a, b, spans, ranks).shape == (0, 16)
    empty = LoraSegments(ints(), ints(), ints(), ints())
    y = torch.randn(3, 16)
    assert torch.equal(lora_forward_one_(y.clone(), torch.ones(3, 8), a, b, empty, ints()), y)
    sums = torch.zeros(1, 8), torch.zeros(1, 16)
    lora_backward_one(torch.zeros(0, 16), torch.zeros(0, 8), a, b, ints(1), torch.zeros(0, 8), *sums, 0)
    assert not any(grad.any() for grad in sums)


def test_what_does_not_fit_is_refused() -> None:
    (a, b), (spans, ranks) = pool(16, 8), segments((0, 2, 4))
    y, x = torch.zeros(2, 16), torch.zeros(2, 8)
    for bad, match in (
        ((y, x, a, b, spans, ranks.long()), "ranks"),
        ((y, torch.zeros(2, 9), a, b, spans, ranks), "a and b"),
        ((y, x, a[:, ::2], b, spans, ranks), "not contiguous"),
        ((torch.zeros(16, 2).t(), x, a, b, spans, ranks), "contiguous in its rows"),
        ((y, x.double().half(), a, b, spans, ranks), "x is torch.float16"),
        ((y, x, a, b, spans, ranks, dropout(3, 0.5)), "3 keys, expected 2"),
        ((y, x, a, b, spans, ranks, dropout(2, 0.5, 0.5)), "2 rates, expected 1"),
    ):
        with pytest.raises(ValueError, match=match):
            lora_forward_one_(*bad)
    with pytest.raises(ValueError, match="da must be contiguous fp32"):
        sums = torch.zeros(1, 8).half(), torch.zeros(1, 16)
        lora_backward_one(y, x, a, b, ints(1), torch.zeros(2, 8), *sums, 0)
