"""Dropout masks: their statistics, and LoRA under them in C++ and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coserve.kernels.dispatch import use_backend
from coserve.kernels.dropout import Dropout, keep_mask, module_salt, row_keys
from coserve.kernels.lora import LoraSegments
from tests.kernels.oracle import DTYPES, check, error, ints, lora_backward_one, lora_forward_one_

SALT = module_salt(2, 5)


def keys(tokens: int, seed: int = 1, step: int = 2, example: int = 3) -> torch.Tensor:
    return torch.from_numpy(row_keys(seed, step, example, np.arange(tokens)))


def dropout(tokens: int, *rates: float) -> Dropout:
    return Dropout(keys(tokens), torch.tensor(rates, dtype=torch.float64), SALT)


def one(tokens: int, rank: int) -> tuple[LoraSegments, torch.Tensor]:
    return LoraSegments(ints(0), ints(tokens), ints(0), torch.arange(rank).int()), ints(rank)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_each_element_falls_with_its_rate_and_alone(rate: float) -> None:
    """Within 5 standard deviations: overall, by token, by feature, and for every pair of neighbours."""
    T, K = 600, 500
    dropped = ~keep_mask(keys(T), SALT, K, torch.tensor(rate, dtype=torch.float64))
    centred, deviation = dropped.double() - rate, (rate * (1 - rate)) ** 0.5
    assert centred.mean().abs() < 5 * deviation / (T * K) ** 0.5
    assert centred.mean(0).abs().max() < 5 * deviation / T**0.5
    assert centred.mean(1).abs().max() < 5 * deviation / K**0.5
    for shifted in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[:, 16:] * centred[:, :-16],
    ):
        assert shifted.mean().abs() < 5 * deviation**2 / shifted.numel() ** 0.5


def test_seed_step_example_position_and_module_each_draw_another_mask() -> None:
    T, K, half = 8, 400, torch.tensor(0.5, dtype=torch.float64)
    bases = [keys(T), keys(T, seed=2), keys(T, step=3), keys(T, example=4), keys(T, 3, 2, 1), keys(T + 1)[1:]]
    masks = [keep_mask(own, SALT, K, half) for own in bases]
    masks += [keep_mask(keys(T), module_salt(*place), K, half) for place in ((2, 4), (3, 5), (5, 2), (0, 0))]
    for index, mask in enumerate(masks):
        assert torch.equal(mask, keep_mask(bases[0], SALT, K, half)) == (index == 0)
        for other in masks[:index]:
            assert abs((mask == other).double().mean() - 0.5) < 5 * 0.5 / (T * K) ** 0.5
    assert row_keys(1, 2, 3, np.array([5, 0])).tolist() == row_keys(1, 2, 3, np.arange(6))[[5, 0]].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.5, 0.999])
def test_compiled_masks_are_the_reference_ones_to_the_bit(isa: str, dtype: torch.dtype, rate: float) -> None:
    """Through identities as A and B the forward shows its mask, and so does dx."""
    T, K = 19, 83
    drop, eye = dropout(T, rate), torch.eye(K, dtype=dtype)
    mask = keep_mask(drop.keys_T, SALT, K, drop.rates_S[0])
    y = lora_forward_one_(
        torch.zeros(T, K, dtype=dtype), torch.ones(T, K, dtype=dtype), eye, eye, *one(T, K), drop
    )
    assert torch.equal(y != 0, mask)
    dx, da, db = torch.zeros(T, K, dtype=dtype), torch.zeros(K, K), torch.zeros(K, K)
    ones = torch.ones(T, K, dtype=dtype)
    lora_backward_one(ones, ones, eye, eye, torch.arange(K).int(), dx, da, db, 0, drop)
    assert torch.equal(dx != 0, mask)
    counts = mask.sum(0) * (1 / (1 - rate))
    torch.testing.assert_close(da[0].double(), counts.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(db[:, 0].double(), counts.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("N", "K"), [(33, 50), (1, 1), (200, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_match_float64(isa: str, N: int, K: int, dtype: torch.dtype) -> None:
    T, rank = 70, 5
    a, b = (torch.randn(40, K) / K**0.5).to(dtype), torch.randn(40, N).to(dtype)
    segments = LoraSegments(ints(0, 9, 30), ints(9, 30, 70), ints(0, 8, 9), torch.randperm(40)[:20].int())
    ranks, mixed = ints(8, 1, rank), dropout(T, 0.0, 0.3, 0.7)
    y, x, dy, dx = (torch.randn(T, size).to(dtype) for size in (N, K, N, K))
    check(lambda y, x, a, b: (lora_forward_one_(y, x, a, b, segments, ranks, mixed),), y, x, a, b)

    def run(dy, x, a, b, dx):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(dy.dtype, torch.float32)
        da, db = torch.ones(rank, K, dtype=wide), torch.ones(rank, N, dtype=wide)
        lora_backward_one(dy, x, a, b, segments.rows[9:14], dx, da, db, 60, dropout(T, 0.4))
        return dx, da, db

    check(run, dy, x, a, b, dx, low_slack=1e-5)


def test_backward_matches_autograd_under_the_same_mask(isa: str) -> None:
    T, rate = 100, 0.4
    a, b, x, dy = torch.randn(3, 40), torch.randn(3, 24), torch.randn(T, 40), torch.randn(T, 24)
    drop = dropout(T, rate)
    mask = keep_mask(drop.keys_T, SALT, 40, drop.rates_S[0])
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (x, a, b)]
        y = (leaves[0] * mask / (1 - rate)) @ leaves[1].t() @ leaves[2]
        wants = torch.autograd.grad(y, leaves, dy.double())
    dx, da, db = torch.zeros(T, 40), torch.zeros(3, 40), torch.zeros(3, 24)
    lora_backward_one(dy, x, a, b, torch.arange(3).int(), dx, da, db, 0, drop)
    for got, want in zip((dx, da, db), wants, strict=True):
        assert error(got, want) < 2e-6
    got = lora_forward_one_(torch.zeros(T, 24), x, a, b, *one(T, 3), drop)
    assert error(got, y.detach()) < 2e-6


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rate_zero_is_no_dropout_to_the_bit(backend: str) -> None:
    a, b, x, dy = torch.randn(3, 40), torch.randn(3, 24), torch.randn(20, 40), torch.randn(20, 24)
    results = []
    with use_backend(backend):
        for drop in (None, dropout(20, 0.0)):
            dx, da, db = torch.zeros(20, 40), torch.zeros(3, 40), torch.zeros(3, 24)
            lora_backward_one(dy, x, a, b, torch.arange(3).int(), dx, da, db, 0, drop)
            results.append((lora_forward_one_(torch.zeros(20, 24), x, a, b, *one(20, 3), drop), dx, da, db))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_cuts_at_tile_edges_change_no_bit(isa: str) -> None:
    T, N, K = 200, 50, 70
    a, b, x, dy = torch.randn(9, K), torch.randn(9, N), torch.randn(T, K), torch.randn(T, N)
    drop = dropout(T, 0.25)

    def in_windows(cut: int) -> list[torch.Tensor]:
        y, dx, da, db = torch.zeros(T, N), torch.zeros(T, K), torch.zeros(9, K), torch.zeros(9, N)
        for at in reversed(range(0, T, cut)):
            span = slice(at, min(at + cut, T))
            part = Dropout(drop.keys_T[span], drop.rates_S, SALT)
            lora_forward_one_(y[span], x[span], a, b, *one(span.stop - at, 9), part)
            lora_backward_one(dy[span], x[span], a, b, torch.arange(9).int(), dx[span], da, db, at, part)
        return [y, dx, da, db]

    whole = in_windows(T)
    assert all(torch.equal(p, q) for p, q in zip(in_windows(64), whole, strict=True))
    assert torch.equal(in_windows(7)[0], whole[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_keys_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="keys must be contiguous int64"):
        Dropout(torch.zeros(2), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="rates must be contiguous float64"):
        Dropout(keys(2), torch.zeros(1))
    a, y, x = torch.zeros(1, 8), torch.zeros(2, 16), torch.zeros(2, 8)
    with use_backend(backend), pytest.raises(ValueError, match="3 keys, expected 2"):
        lora_forward_one_(y, x, a, torch.zeros(1, 16), *one(2, 1), dropout(3, 0.5))
    with use_backend(backend), pytest.raises(ValueError, match="2 rates, expected 1"):
        sums = torch.zeros(1, 8), torch.zeros(1, 16)
        lora_backward_one(y, x, a, torch.zeros(1, 16), ints(0), x, *sums, 0, dropout(2, 0.5, 0.5))
