from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from coserve.kernels.dispatch import has_pair_dots
from coserve.kernels.linear import PackedLinear
from tests.kernels.oracle import DTYPES, error

SHAPES = [(1, 1), (16, 7), (48, 64), (49, 33), (100, 257), (256, 768), (130, 513)]


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_fp32_error_is_no_worse_than_torch(isa: str, N: int, K: int) -> None:
    weight, bias = torch.randn(N, K), torch.randn(N)
    linear = PackedLinear(weight, bias)
    for M in (0, 1, 3, 9, 65, 130):
        x, dy = torch.randn(M, K), torch.randn(M, N)
        want = F.linear(x.double(), weight.double(), bias.double())
        assert error(linear.forward(x), want) <= max(1.5 * error(F.linear(x, weight, bias), want), 1e-6)
        want = dy.double() @ weight.double()
        assert error(linear.backward_input(dy), want) <= max(1.5 * error(dy @ weight, want), 1e-6)


@pytest.mark.parametrize(("N", "K"), [(49, 33), (256, 768), (100, 513)])
def test_fp32_row_does_not_depend_on_its_batch(isa: str, threads: int, N: int, K: int) -> None:
    linear = PackedLinear(torch.randn(N, K), torch.randn(N))
    x, dy = torch.randn(200, K), torch.randn(200, N)
    y = torch.cat([linear.forward(row) for row in x.split(1)])
    dx = torch.cat([linear.backward_input(row) for row in dy.split(1)])
    for M in (*range(1, 34), 47, 64, 100, 127, 128, 129, 199, 200):
        assert torch.equal(linear.forward(x[200 - M :]), y[200 - M :])
    for M in (2, 5, 8, 13, 64, 131, 200):
        assert torch.equal(linear.backward_input(dy[:M]), dx[:M])


def test_row_stride_is_free() -> None:
    linear, wide = PackedLinear(torch.randn(20, 30)), torch.randn(5, 100)
    assert torch.equal(linear.forward(wide[:, 10:40]), linear.forward(wide[:, 10:40].contiguous()))


def test_bf16_is_as_good_as_torch() -> None:
    weight, bias, x = (
        torch.randn(96, 160).bfloat16(),
        torch.randn(96).bfloat16(),
        torch.randn(7, 160).bfloat16(),
    )
    linear = PackedLinear(weight, bias)
    want = F.linear(x.double(), weight.double(), bias.double())
    assert linear.forward(x).dtype == torch.bfloat16
    assert error(linear.forward(x), want) <= 2 * error(F.linear(x, weight, bias), want)
    assert linear.forward(x[:0]).shape == (0, 96)


@pytest.mark.parametrize(("N", "K"), [(2, 1), (96, 33), (130, 129), (1026, 80), (1538, 640)])
def test_bf16_input_gradient_is_as_good_as_torch(isa: str, threads: int, N: int, K: int) -> None:
    weight = torch.randn(N, K).bfloat16()
    linear = PackedLinear(weight)
    for M in (0, 1, 6, 65, 515):
        dy = torch.randn(M, N + 4).bfloat16()[:, 2:-2]
        dx, want = linear.backward_input(dy), dy.double() @ weight.double()
        assert dx.dtype == torch.bfloat16
        assert error(dx, want) <= 1.1 * error(dy @ weight, want) + 1e-6


def test_bf16_input_gradient_of_a_row_does_not_depend_on_its_batch() -> None:
    linear, dy = PackedLinear(torch.randn(1026, 80).bfloat16()), torch.randn(520, 1026).bfloat16()
    if not (has_pair_dots() and linear._own_gradient):
        pytest.skip("torch's product serves this CPU")
    dx = linear.backward_input(dy)
    for first, M in ((0, 1), (3, 2), (64, 64), (100, 11), (5, 512)):
        assert torch.equal(linear.backward_input(dy[first : first + M]), dx[first : first + M])


def test_bf16_odd_width_and_wrong_input() -> None:
    linear = PackedLinear(torch.randn(7, 6).bfloat16())
    dy = torch.randn(3, 7).bfloat16()
    assert torch.equal(linear.backward_input(dy), dy @ linear.weight)
    with pytest.raises((ValueError, RuntimeError)):
        PackedLinear(torch.randn(8, 6).bfloat16()).backward_input(dy)


def test_nbytes_counts_the_packs() -> None:
    for dtype in DTYPES:
        weight = torch.randn(48, 32).to(dtype)
        linear = PackedLinear(weight)
        before = linear.nbytes
        assert before >= weight.nbytes
        linear.backward_input(torch.randn(1, 48).to(dtype))
        assert linear.nbytes >= before


def test_wrong_input_is_refused(isa: str) -> None:
    linear = PackedLinear(torch.randn(8, 6))
    with pytest.raises(ValueError, match=r"expected fp32 \[T, 6\]"):
        linear.forward(torch.randn(2, 7))
    with pytest.raises(ValueError, match="contiguous rows"):
        linear.forward(torch.randn(6, 2).t())
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(torch.randn(8, 6), torch.randn(7))
