from __future__ import annotations

import pytest
import torch

from coserve.kernels.paged_attention import paged_attention
from coserve.kernels.triton import paged_attention as paged
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
from tests.kernels.oracle import INTERPRETED_DTYPES, check, ints

ROUNDED = 2e-3  # where weights and slopes are rounded to fp16
SHARED = [(0, (30,)), (40, (50, 3, 40)), (0, (10,)), (5, (9, 9))]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SPLIT", 64)


@pytest.mark.parametrize("heads", [(4, 2, 64), (7, 1, 80), (2, 2, 128), (2, 1, 5)])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_paged_attention_matches_float64(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    args = paged_case([1, 64, 65, 90, 33, 0], [1, 1, 65, 3, 0, 0], heads, dtype)
    check(lambda *a: (paged_attention(*a),), *args, low_slack=ROUNDED)


@pytest.mark.parametrize(
    ("window", "cap", "block_size"), [(1, 0.0, 16), (40, 50.0, 7), (149, 0.0, 128), (0, 0.5, 1)]
)
def test_paged_windows_caps_and_splits_match_float64(
    short_splits: None, window: int, cap: float, block_size: int
) -> None:
    case = paged_case([1, 64, 65, 70, 200], [1, 1, 1, 3, 1], (4, 2, 20), torch.float32, block_size)
    check(lambda *a: (paged_attention(*a, window, cap),), *case)


@pytest.mark.parametrize("how", [(0, 0.0), (70, 3.0)])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_decode_and_prefill_agree_to_the_bit(
    short_splits: None, how: tuple[int, float], dtype: torch.dtype
) -> None:
    q, k, v, tables, _, lengths, scale = paged_case([150], [150], (4, 1, 32), dtype)
    whole = paged_attention(q, k, v, tables, ints(0, 150), lengths, scale, *how)
    cut = paged_attention(q[77:], k, v, tables, ints(0, 73), lengths, scale, *how)
    assert torch.equal(cut, whole[77:])
    for i in (0, 63, 64, 128, 149):
        one = paged_attention(q[i : i + 1], k, v, tables, ints(0, 1), ints(i + 1), scale, *how)
        assert torch.equal(one, whole[i : i + 1])


def test_a_row_does_not_depend_on_its_batch_nor_on_padding(short_splits: None) -> None:
    case = paged_case([70, 5, 129, 90], [1, 5, 1, 40], (4, 2, 16), torch.float32)
    q, k, v, tables, starts, lengths, scale = case
    whole = paged_attention(q, k, v, tables, starts, lengths, scale)
    for s in range(4):
        begin, end = int(starts[s]), int(starts[s + 1])
        cut = tables[s : s + 1], ints(0, end - begin), lengths[s : s + 1]
        assert torch.equal(paged_attention(q[begin:end], k, v, *cut, scale), whole[begin:end])
    padded_q = torch.cat([q, torch.full((9, 4, 16), float("nan"))])
    padded_tables = torch.cat([tables, torch.zeros_like(tables[:3])])
    bounds = torch.cat([starts, starts[-1:].repeat(3)]), torch.cat([lengths, ints(0, 0, 0)])
    padded = paged_attention(padded_q, k, v, padded_tables, *bounds, scale)
    assert torch.equal(padded[: len(q)], whole)


def test_more_heads_a_group_than_a_tile_has_rows() -> None:
    check(lambda *a: (paged_attention(*a),), *paged_case([9, 3], [2, 1], (70, 1, 16), torch.float32))


def test_no_rows_are_no_work() -> None:
    q, k, v, tables, _, _, scale = paged_case([3], [1], (2, 1, 16), torch.float32)
    assert paged_attention(q[:0], k, v, tables[:0], ints(0), ints(), scale).shape == (0, 2, 16)
    o, lse = window_attention(q[:0], q[:, :1], q[:, :1], ints(), 1, scale)
    assert o.shape == (0, 2, 16) and lse.shape == (0, 2)


def test_paged_attention_refuses_what_does_not_fit() -> None:
    check_refusals(torch.float16)
    q, k, v, *tables = paged_case([4], [1], (2, 1, 16), torch.float32)
    with pytest.raises(ValueError, match="q of strides"):
        paged_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *tables)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
@pytest.mark.parametrize(
    ("heads", "T", "window_start"),
    [
        ((1, 1, 16), 1, 0),
        ((4, 2, 32), 64, 0),
        ((7, 1, 64), 130, 70),
        ((8, 1, 80), 66, 65),
        ((1, 1, 128), 130, 64),
        ((2, 1, 5), 65, 0),
    ],
)
def test_window_attention_matches_float64(
    heads: tuple[int, int, int], dtype: torch.dtype, T: int, window_start: int
) -> None:
    check_window(stream(T, heads, dtype, (40, 41, 128)), window_start, 0.0, ROUNDED)


@pytest.mark.parametrize(("window", "cap"), [(1, 0.0), (30, 50.0), (999, 0.3)])
def test_sliding_and_capped_windows_match_float64(window: int, cap: float) -> None:
    q, k, v, do, sample_start = stream(140, (2, 1, 20), torch.float32, (40, 90))
    check_window((q, k, v, do, sliding(sample_start, window)), 64, cap, ROUNDED)


@pytest.mark.parametrize("window", [999, 90])
def test_windows_cut_at_tiles_give_the_same_bits(window: int) -> None:
    q, k, v, do, sample_start = stream(200, (2, 1, 16), torch.float32, (100, 131))
    case = q, k, v, do, sliding(sample_start, window)
    whole, cut = in_windows(200, 200, case), in_windows(200, 64, case)
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize(("heads", "window_start", "cap"), [((4, 2, 16), 0, 0.0), ((7, 1, 20), 100, 2.0)])
def test_shared_prefixes_match_float64(heads: tuple[int, int, int], window_start: int, cap: float) -> None:
    first, gaps = sharing(*SHARED)
    q, k, v, do, _ = stream(len(first), heads, torch.float32, ())
    check_window((q, k, v, do, first), window_start, cap, ROUNDED, gaps)


def test_readers_of_a_prefix_are_as_beside_a_copy_of_it() -> None:
    check_readers_alone(torch.float32, 3e-6)


def test_cuts_of_shared_prefixes_change_no_bit() -> None:
    first, gaps = sharing(*SHARED)
    q, k, v, do, _ = stream(len(first), (2, 1, 16), torch.float32, ())
    case, T = (q, k, v, do, first), len(first)
    whole, cut = in_windows(T, T, case, gaps), in_windows(T, 64, case, gaps)
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_window_attention_takes_column_slices() -> None:
    check_column_slices()
    q, k, starts = torch.randn(20, 4, 16), torch.randn(20, 2, 16), torch.zeros(20, dtype=torch.int32)
    o, lse = window_attention(q, k, k, starts, 0, 0.25)
    dk = torch.zeros(20, 2, 32)[..., :16]
    with pytest.raises(ValueError, match="dk of strides"):
        window_attention_backward(q, q, o, lse, k, k, starts, 0, 0.25, dk, dk)
