from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from coserve.kernels import linear as kernels_linear
from coserve.kernels.dispatch import use_backend
from coserve.kernels.linear import PackedLinear
from tests.kernels.oracle import DTYPES, error

# Edges of panels (16), of tiles (6 rows, 4 panels), of blocks of depth (256, 512), odd depths.
SHAPES = [(1, 1), (16, 7), (48, 64), (49, 33), (100, 257), (256, 768), (130, 513), (1026, 80), (600, 5)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@each_dtype
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_error_is_no_worse_than_torch(isa: str, dtype: torch.dtype, N: int, K: int) -> None:
    weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    linear = PackedLinear(weight, bias)
    for M in (0, 1, 3, 9, 65, 130):
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        y, dx = linear.forward(x), linear.backward_input(dy)
        assert y.dtype == dx.dtype == dtype
        want = F.linear(x.double(), weight.double(), bias.double())
        assert error(y, want) <= max(1.5 * error(F.linear(x, weight, bias), want), 1e-6)
        want = dy.double() @ weight.double()
        assert error(dx, want) <= max(1.5 * error(dy @ weight, want), 1e-6)


@each_dtype
@pytest.mark.parametrize(("N", "K"), [(49, 33), (256, 768), (100, 513), (530, 80)])
def test_a_row_does_not_depend_on_its_batch(
    isa: str, threads: int, dtype: torch.dtype, N: int, K: int
) -> None:
    linear = PackedLinear(torch.randn(N, K).to(dtype), torch.randn(N).to(dtype))
    x, dy = torch.randn(200, K).to(dtype), torch.randn(200, N).to(dtype)
    y = torch.cat([linear.forward(row) for row in x.split(1)])
    dx = torch.cat([linear.backward_input(row) for row in dy.split(1)])
    for M in (*range(1, 34), 47, 64, 100, 127, 128, 129, 199, 200):
        assert torch.equal(linear.forward(x[200 - M :]), y[200 - M :])
    for M in (2, 5, 8, 13, 64, 131, 200):
        assert torch.equal(linear.backward_input(dy[:M]), dx[:M])


@each_dtype
def test_more_rows_than_share_a_block(isa: str, threads: int, dtype: torch.dtype) -> None:
    linear = PackedLinear(torch.randn(70, 90).to(dtype))
    x, dy = torch.randn(1030, 90).to(dtype), torch.randn(1030, 70).to(dtype)
    assert torch.equal(linear.forward(x)[509:515], linear.forward(x[509:515]))
    assert torch.equal(linear.backward_input(dy)[1020:], linear.backward_input(dy[1020:]))


@each_dtype
@pytest.mark.parametrize(("N", "K"), [(49, 33), (256, 768), (530, 80)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parts_have_the_bits_of_the_whole(
    isa: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, N: int, K: int, backend: str
) -> None:
    monkeypatch.setattr(kernels_linear, "PART", 70 * 16 * K)
    monkeypatch.setattr(kernels_linear, "LEAST_ROWS", 8)
    with use_backend(backend):
        linear = PackedLinear(torch.randn(N, K).to(dtype), torch.randn(N).to(dtype))
        x, dy, y = torch.randn(70, K).to(dtype), torch.randn(70, N).to(dtype), torch.empty(70, N, dtype=dtype)
        columns, rows = linear.column_parts(70), linear.row_parts(70)
        assert backend == "reference" or (len(columns) == -(-N // 16) and len(rows) > 1)
        for part in columns:
            linear.forward_columns(x, y, part)
        assert torch.equal(y, linear.forward(x))
        parts = [linear.backward_input(dy[part]) for part in rows]
        assert torch.equal(torch.cat(parts), linear.backward_input(dy))
        if backend == "auto":
            with pytest.raises(ValueError, match="expected"):
                linear.forward_columns(x[:, :3], y, columns[0])


@each_dtype
def test_row_stride_is_free_and_what_lies_between_rows_is_not_read(isa: str, dtype: torch.dtype) -> None:
    linear, wide = PackedLinear(torch.randn(21, 31).to(dtype)), torch.full((5, 100), torch.nan, dtype=dtype)
    wide[:, 10:41] = torch.randn(5, 31)
    assert torch.equal(linear.forward(wide[:, 10:41]), linear.forward(wide[:, 10:41].contiguous()))
    assert torch.equal(linear.backward_input(wide[:, 10:31]), linear.backward_input(wide[:, 10:31].clone()))


@each_dtype
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_rows_and_the_whole_come_back_to_the_bit(isa: str, dtype: torch.dtype, N: int, K: int) -> None:
    weight = torch.randn(N, K).to(dtype)
    linear, ids = PackedLinear(weight), torch.randint(N, (40,))
    assert torch.equal(linear.unpacked(), weight)
    assert torch.equal(linear.rows(ids), weight[ids]) and linear.rows(ids[:0]).shape == (0, K)


@each_dtype
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_joined_and_converted(isa: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    parts = [torch.randn(n, 45).to(stored) for n in (5, 33, 64, 3)]
    linear, whole = PackedLinear(parts, dtype=dtype), torch.cat(parts).to(dtype)
    assert linear.out_features == 105 and linear.dtype == dtype and torch.equal(linear.unpacked(), whole)
    linear.fill(14, parts[0] * 2)
    whole[14:19] = (parts[0] * 2).to(dtype)
    assert torch.equal(linear.unpacked(), whole)
    with pytest.raises(ValueError, match="44 columns"):
        linear.fill(0, torch.randn(1, 44))


@each_dtype
def test_a_transposed_weight_is_packed_too(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(30, 20).to(dtype).t()
    assert torch.equal(PackedLinear(weight).unpacked(), weight)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=("fp32", "bf16", "fp64"))
def test_torch_where_there_are_no_kernels(dtype: torch.dtype) -> None:
    weight, bias, x, dy = (torch.randn(s).to(dtype) for s in ((20, 30), (20,), (4, 30), (4, 20)))
    packed, ids = PackedLinear(weight, bias), torch.tensor([19, 0, 19])
    with use_backend("reference"):
        for linear in (packed, PackedLinear([weight[:7], weight[7:]], bias)):
            assert torch.equal(linear.forward(x), F.linear(x, weight, bias))
            assert torch.equal(linear.backward_input(dy), dy @ weight)
            assert torch.equal(linear.rows(ids), weight[ids])
        linear.fill(3, dy[:, :1].expand(4, 30))
        assert torch.equal(linear.unpacked()[3:7], dy[:, :1].expand(4, 30))


@each_dtype
def test_nbytes_are_those_of_one_copy(dtype: torch.dtype) -> None:
    linear = PackedLinear(torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype))
    size = dtype.itemsize
    assert (linear.weight_nbytes, linear.nbytes) == (48 * 64 * size, 48 * 65 * size)
    linear.backward_input(torch.randn(1, 48).to(dtype))
    assert linear.nbytes == 48 * 65 * size


@each_dtype
def test_wrong_input_is_refused(isa: str, dtype: torch.dtype) -> None:
    linear, kind = PackedLinear(torch.randn(8, 6).to(dtype)), str(dtype)
    with pytest.raises(ValueError, match=rf"expected {kind} \[T, 6\]"):
        linear.forward(torch.randn(2, 7).to(dtype))
    with pytest.raises(ValueError, match=rf"dy is .*expected {kind} \[T, 8\]"):
        linear.backward_input(torch.randn(2, 6).to(dtype))
    with pytest.raises(ValueError, match=rf"expected {kind}"):
        linear.forward(torch.randn(2, 6).to(torch.bfloat16 if dtype == torch.float32 else torch.float32))
    with pytest.raises(ValueError, match="contiguous rows"):
        linear.forward(torch.randn(6, 2).to(dtype).t())
    with pytest.raises(ValueError, match="ids are"):
        linear.rows(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(torch.randn(8, 6).to(dtype), torch.randn(7).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_writes_where_it_is_told(dtype: torch.dtype) -> None:
    linear = PackedLinear(torch.randn(50, 30).to(dtype), torch.randn(50).to(dtype))
    x, out = torch.randn(7, 30).to(dtype), torch.zeros(9, 50, dtype=dtype)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            assert linear.forward(x, out[1:8]).data_ptr() == out[1:8].data_ptr()
            assert torch.equal(out[1:8], linear.forward(x)) and not out[0].any() and not out[8].any()
    with pytest.raises(ValueError, match="out is not"):
        linear.forward(x, out)
