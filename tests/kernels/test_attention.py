from __future__ import annotations

import pytest
import torch

from coserve.kernels.paged_attention import paged_attention
from coserve.kernels.window_attention import window_attention, window_attention_backward
from tests.kernels.attention_cases import (
    check_column_slices,
    check_readers_alone,
    check_refusals,
    check_window,
    in_windows,
    paged_case,
    sharing,
    sliding,
    stream,
)
from tests.kernels.oracle import DTYPES, check, error, ints

WINDOWS = [
    ((1, 1, 16), 1, 0),
    ((4, 2, 32), 64, 0),
    ((7, 1, 64), 150, 70),
    ((8, 1, 80), 66, 65),
    ((6, 6, 128), 130, 0),
    ((3, 3, 20), 65, 0),
    ((2, 1, 5), 150, 64),
]
HEADS = [(1, 1, 16), (4, 2, 32), (7, 1, 64), (8, 1, 80), (6, 6, 128), (3, 3, 20), (2, 1, 5)]

# Where weights and slopes are rounded to be factors; torch's own bf16 attention is 4e-3 to 6e-3 off.
ROUNDED = 4e-3


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_matches_float64(isa: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    lengths, queries = [1, 64, 65, 150, 33], [1, 1, 65, 3, 0]
    args = paged_case(lengths, queries, heads, dtype)
    check(lambda *a: (paged_attention(*a),), *args)


@pytest.mark.parametrize(
    ("window", "cap"), [(1, 0.0), (40, 0.0), (64, 2.0), (65, 0.0), (149, 50.0), (0, 0.5)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_windows_and_caps_match_float64(isa: str, window: int, cap: float, dtype: torch.dtype) -> None:
    args = paged_case([1, 64, 65, 150, 300], [1, 1, 65, 3, 130], (4, 2, 20), dtype)
    check(lambda *a: (paged_attention(*a, window, cap),), *args)


def test_paged_window_sees_its_last_keys_only() -> None:
    q, k, v, tables, starts, lengths, scale = paged_case([90], [1], (2, 1, 16), torch.float32)
    whole = paged_attention(q, k, v, tables, starts, lengths, scale, 90)
    assert torch.equal(whole, paged_attention(q, k, v, tables, starts, lengths, scale))
    before = paged_attention(q, k, v, tables, starts, lengths, scale, 26)
    for block in range(4):  # the 64 oldest keys
        v[tables[0, block]] = 1e3
    assert torch.equal(paged_attention(q, k, v, tables, starts, lengths, scale, 26), before)
    assert not torch.equal(paged_attention(q, k, v, tables, starts, lengths, scale, 27), before)


@pytest.mark.parametrize("how", [(0, 0.0), (50, 0.0), (64, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_prefill_and_decode_agree_to_the_bit(
    isa: str, dtype: torch.dtype, how: tuple[int, float]
) -> None:
    q, k, v, tables, _, lengths, scale = paged_case([150], [150], (4, 2, 64), dtype)
    whole = paged_attention(q, k, v, tables, ints(0, 150), lengths, scale, *how)
    for cut in (1, 37, 64, 149):
        parts = [
            paged_attention(q[a:b], k, v, tables, ints(0, b - a), ints(b), scale, *how)
            for a, b in ((0, cut), (cut, 150))
        ]
        assert torch.equal(torch.cat(parts), whole)
    single = [
        paged_attention(q[i : i + 1], k, v, tables, ints(0, 1), ints(i + 1), scale, *how) for i in range(150)
    ]
    assert torch.equal(torch.cat(single), whole)


def test_paged_row_does_not_depend_on_its_batch(isa: str) -> None:
    q, k, v, tables, starts, lengths, scale = paged_case([70, 5, 129], [1, 5, 40], (4, 2, 16), torch.float32)
    whole = paged_attention(q, k, v, tables, starts, lengths, scale)
    for s in range(3):
        begin, end = int(starts[s]), int(starts[s + 1])
        alone = paged_attention(
            q[begin:end], k, v, tables[s : s + 1], ints(0, end - begin), lengths[s : s + 1], scale
        )
        assert torch.equal(alone, whole[begin:end])


def test_paged_attention_refuses_what_does_not_fit() -> None:
    check_refusals(torch.bfloat16)
    q, k, v, *tables, scale = paged_case([4], [1], (2, 1, 16), torch.float32)
    with pytest.raises(ValueError, match="scale"):
        paged_attention(q, k, v, *tables, -scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "T", "window_start"), WINDOWS)
def test_window_attention_matches_float64(
    isa: str, heads: tuple[int, int, int], dtype: torch.dtype, T: int, window_start: int
) -> None:
    check_window(stream(T, heads, dtype, (40, 41, 128)), window_start, 0.0, ROUNDED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(1, 0.0), (30, 0.0), (64, 1.5), (100, 50.0), (999, 0.3)])
def test_sliding_and_capped_windows_match_float64(
    isa: str, window: int, cap: float, dtype: torch.dtype
) -> None:
    q, k, v, do, sample_start = stream(200, (4, 2, 20), dtype, (40, 90))
    check_window((q, k, v, do, sliding(sample_start, window)), 64, cap, ROUNDED)


def test_capped_sliding_backward_matches_autograd(isa: str) -> None:
    q, k, v, do, sample_start = stream(130, (4, 2, 16), torch.float32, (20,))
    first = sliding(sample_start, 37)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        position = torch.arange(130)
        hidden = (position[None] > position[:, None]) | (position[None] < first[:, None])
        kk, vv = (t.repeat_interleave(2, 1) for t in leaves[1:])
        scores = 1.5 * torch.tanh(torch.einsum("tnd,jnd->ntj", leaves[0], kk) * 0.25 / 1.5)
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        wants = torch.autograd.grad(torch.einsum("ntj,jnd->tnd", p, vv), leaves, do.double())
    o, lse = window_attention(q, k, v, first, 0, 0.25, 1.5)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = window_attention_backward(do, q, o, lse, k, v, first, 0, 0.25, dk, dv, 1.5)
    for got, want in zip((dq, dk, dv), wants, strict=True):
        assert error(got, want) < 2e-6


def test_window_backward_matches_autograd(isa: str) -> None:
    q, k, v, do, sample_start = stream(130, (4, 2, 16), torch.float32, (50,))
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        position = torch.arange(130)
        hidden = (position[None] > position[:, None]) | (position[None] < sample_start[:, None])
        kk, vv = (t.repeat_interleave(2, 1) for t in leaves[1:])
        scores = torch.einsum("tnd,jnd->ntj", leaves[0], kk) * 0.25
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        wants = torch.autograd.grad(torch.einsum("ntj,jnd->tnd", p, vv), leaves, do.double())
    o, lse = window_attention(q, k, v, sample_start, 0, 0.25)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = window_attention_backward(do, q, o, lse, k, v, sample_start, 0, 0.25, dk, dv)
    for got, want in zip((dq, dk, dv), wants, strict=True):
        assert error(got, want) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_cuts(isa: str, dtype: torch.dtype) -> None:
    T = 530
    case = stream(T, (4, 2, 16), dtype, (100, 131))
    whole = in_windows(T, T, case)
    for cut in (64, 128, 512):
        assert all(torch.equal(a, b) for a, b in zip(in_windows(T, cut, case), whole, strict=True))
    for cut in (7, 100):
        o, lse, *gradients = in_windows(T, cut, case)
        assert torch.equal(o, whole[0]) and torch.equal(lse, whole[1])
        bound = 2e-6 if dtype == torch.float32 else 1e-2
        assert all(error(a, b.double()) < bound for a, b in zip(gradients, whole[2:], strict=True))
    q, k, v, do, sample_start = case
    case = q, k, v, do, sliding(sample_start, 150)
    whole = in_windows(T, T, case)
    for cut in (64, 192):
        assert all(torch.equal(a, b) for a, b in zip(in_windows(T, cut, case), whole, strict=True))
    one = stream(70, (2, 1, 16), torch.float32, ())
    assert torch.equal(in_windows(70, 1, one)[0], in_windows(70, 70, one)[0])


SHARED = [(0, (30,)), (40, (50, 3, 64)), (130, (1, 70, 20)), (0, (10,)), (64, (64, 64)), (5, (9, 9))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "window_start", "cap"), [((4, 2, 32), 0, 0.0), ((7, 1, 64), 200, 2.0), ((3, 3, 20), 64, 0.0)]
)
def test_shared_prefixes_match_float64(
    isa: str, heads: tuple[int, int, int], window_start: int, cap: float, dtype: torch.dtype
) -> None:
    first, gaps = sharing(*SHARED)
    q, k, v, do, _ = stream(len(first), heads, dtype, ())
    check_window((q, k, v, do, first), window_start, cap, ROUNDED, gaps)


def test_readers_of_a_prefix_are_as_beside_a_copy_of_it(isa: str) -> None:
    check_readers_alone(torch.float32, 3e-6)
    check_readers_alone(torch.bfloat16, 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_of_shared_prefixes_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    first, gaps = sharing(*SHARED, (300, (200, 250)))
    q, k, v, do, _ = stream(len(first), (4, 2, 16), dtype, ())
    case, T = (q, k, v, do, first), len(first)
    whole = in_windows(T, T, case, gaps)
    for cut in (64, 192, 512):
        assert all(torch.equal(a, b) for a, b in zip(in_windows(T, cut, case, gaps), whole, strict=True))


def test_window_backward_does_not_depend_on_threads() -> None:
    case = stream(700, (2, 1, 32), torch.float32, ())
    before = torch.get_num_threads()
    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append(in_windows(700, 700, case))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_window_attention_takes_column_slices(isa: str) -> None:
    check_column_slices()
