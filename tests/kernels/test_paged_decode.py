"""Decoding over long contexts: chunks of 512 keys, split over threads, and the same bits as in a prefill."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.paged_attention import paged_attention
from tests.kernels.attention_cases import paged_case
from tests.kernels.oracle import DTYPES, check, ints
from tests.kernels.test_attention import ROUNDED


@pytest.mark.parametrize("heads", [(1, 1, 64), (4, 2, 80), (3, 1, 96), (8, 2, 128), (5, 1, 256), (12, 2, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_matches_float64(isa: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    lengths = [1, 63, 64, 65, 511, 512, 513, 1100]
    args = paged_case(lengths, [1] * len(lengths), heads, dtype)
    check(lambda *a: (paged_attention(*a),), *args, low_slack=ROUNDED)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_matches_float64_for_every_group(isa: str, group: int, dtype: torch.dtype) -> None:
    args = paged_case([70, 530], [1, 1], (2 * group, 2, 32), dtype, block_size=8)
    check(lambda *a: (paged_attention(*a, 0, 3.0),), *args, low_slack=ROUNDED)


@pytest.mark.parametrize("how", [(0, 0.0), (1, 0.0), (90, 0.0), (530, 3.0)])
@pytest.mark.parametrize("heads", [(2, 2, 32), (7, 1, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_and_decode_of_long_contexts_agree_to_the_bit(
    isa: str, dtype: torch.dtype, heads: tuple[int, int, int], how: tuple[int, float]
) -> None:
    T = 1060
    q, k, v, tables, _, lengths, scale = paged_case([T], [T], heads, dtype)
    whole = paged_attention(q, k, v, tables, ints(0, T), lengths, scale, *how)
    for position in (0, 1, 63, 64, 511, 512, 513, 575, 576, 1023, 1024, 1059):
        row = slice(position, position + 1)
        alone = paged_attention(q[row], k, v, tables, ints(0, 1), ints(position + 1), scale, *how)
        assert torch.equal(alone, whole[row])
    for begin, end in ((500, 503), (1000, 1060)):
        part = paged_attention(q[begin:end], k, v, tables, ints(0, end - begin), ints(end), scale, *how)
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("how", [(0, 0.0), (700, 2.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_does_not_depend_on_threads(isa: str, dtype: torch.dtype, how: tuple[int, float]) -> None:
    """On many threads the chunks of a long context are tasks of their own, of a short one not."""
    args = paged_case([4100, 5, 600, 0, 2050], [1, 1, 30, 0, 3], (4, 2, 64), dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(paged_attention(*args, *how))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    for s, (begin, end) in enumerate(((0, 1), (1, 2), (2, 32), (32, 32), (32, 35))):
        q, k, v, tables, _, lengths, scale = args
        alone = (q[begin:end], k, v, tables[s : s + 1], ints(0, end - begin), lengths[s : s + 1], scale)
        assert torch.equal(paged_attention(*alone, *how), results[0][begin:end])
