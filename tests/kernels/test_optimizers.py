"""The optimizers' kernels against torch, and 8-bit moments against their reference and against fp32."""

from __future__ import annotations

import pytest
import torch

from coserve.kernels.adamw import adamw_
from coserve.kernels.adamw_8bit import (
    BLOCK,
    QuantizedMoments,
    adamw_8bit_,
    code_table,
    dynamic_map,
    map_edges,
)
from coserve.kernels.chunk_squares import CHUNK, chunk_squares
from tests.kernels.optimizer_cases import (
    ADAM,
    SPANS,
    check_8bit,
    check_8bit_only_decays,
    check_adamw,
    check_sgd,
    gradients,
)


def test_the_maps_are_those_of_the_paper() -> None:
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    for values in (signed, unsigned):
        assert len(values) == 256 and bool((values.diff() > 0).all()) and values[-1] == 1.0
        assert (values == 0).sum() == 1
    # Each value but the 1 has its mirror image.
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert unsigned[0] == 0.0
    # The smallest decade: one value each sign, the middle of [0.1, 1] times 1e-6; two in the unsigned map.
    assert signed[128].item() == pytest.approx(0.55e-6)
    assert unsigned[1:3].tolist() == pytest.approx([0.325e-6, 0.775e-6])
    # The largest: 64 and 128 equal parts.
    assert signed[254].item() == pytest.approx(1 - 0.9 / 128)
    assert unsigned[254].item() == pytest.approx(1 - 0.9 / 256)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_to_the_nearest_code_and_never_to_a_zero_second_moment(signed: bool) -> None:
    values, edges = dynamic_map(signed), map_edges(signed)
    x = torch.rand(4000) * (2 if signed else 1) - (1 if signed else 0)
    x = x * torch.logspace(-7, 0, 4000)
    nearest = (x[:, None] - values).abs().min(1).values
    got = (values[torch.bucketize(x, edges)] - x).abs()
    kept = x.abs() >= (0.0 if signed else values[1].item())
    assert torch.equal(got[kept], nearest[kept])
    smallest = torch.bucketize(torch.tensor([1e-30]), edges)
    assert values[smallest].item() == (0.0 if signed else values[1].item())


@pytest.mark.parametrize("signed", [True, False])
def test_the_upper_half_of_a_float_tells_its_code_but_for_one_edge(signed: bool) -> None:
    edges, codes = map_edges(signed), code_table(signed)
    x = torch.cat(
        (torch.rand(100_000) * torch.logspace(-9, 0, 100_000), edges.abs(), torch.tensor([0.0, 1.0, 1e-30]))
    )
    x = torch.cat((x, -x)) if signed else x
    code = codes[(x.view(torch.int32) >> 16).bitwise_and(0xFFFF).long()].long()
    assert torch.equal(code + (edges[code] < x), torch.bucketize(x, edges))


@pytest.mark.parametrize("size", [1, 5, CHUNK, CHUNK + 1, 100_003])
def test_squares_of_chunks(isa: str, size: int) -> None:
    x = torch.randn(size) * torch.logspace(-6, 3, size)
    want = torch.stack([part.double().square().sum() for part in x.split(CHUNK)])
    assert torch.allclose(chunk_squares(x), want, rtol=1e-14, atol=0)
    x[-1] = float("nan")
    assert bool(chunk_squares(x)[-1].isnan())


@pytest.mark.parametrize("spans", [*SPANS, [(0, 7000, 2.0)]])
def test_8bit_matches_its_reference(isa: str, spans: list[tuple[int, int, float]]) -> None:
    check_8bit(spans, 12)


@pytest.mark.parametrize(("decades", "bound"), [(1, 0.05), (2, 0.08), (3, 0.2), (4, 0.45)])
def test_8bit_follows_fp32_adamw(isa: str, decades: int, bound: float) -> None:
    """Weights after 60 steps; measured 0.025, 0.05, 0.12, 0.30 of the way that fp32 went. With second moments
    rounded to zero it is 0.025, 0.05, 2.7, 14."""
    size, steps = 4000, 60
    start = 0.02 * torch.randn(size)
    eight, full, moments = start.clone(), start.clone(), QuantizedMoments.zeros([(0, size, 1.0)])
    exp_avg, exp_avg_sq = torch.zeros(size), torch.zeros(size)
    for step, grad in enumerate(gradients(size, steps, decades), 1):
        adamw_8bit_(eight, grad, moments, step=step, **ADAM)
        adamw_(full, grad, exp_avg, exp_avg_sq, step=step, **ADAM)
    assert (eight - full).norm() < bound * (full - start).norm()
    assert (eight - start).abs().max() < 2 * (full - start).abs().max()


def test_8bit_does_not_depend_on_threads() -> None:
    size = 70_000
    start, given, ends = torch.randn(size), gradients(size, 2), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        param, moments = start.clone(), QuantizedMoments.zeros([(0, size, 1.0)])
        for step, grad in enumerate(given, 1):
            adamw_8bit_(param, grad, moments, step=step, **ADAM)
        ends.append((param, moments))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1].m_BE, ends[1][1].m_BE)


def test_8bit_of_a_zero_gradient_only_decays(isa: str) -> None:
    check_8bit_only_decays()


def test_8bit_takes_about_a_quarter_of_the_bytes() -> None:
    assert QuantizedMoments.zeros([(0, 100 * BLOCK, 1.0)]).nbytes < 0.3 * 8 * 100 * BLOCK


def test_8bit_refuses_other_dtypes() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="grad must"):
        adamw_8bit_(x, x.bfloat16(), QuantizedMoments.zeros([(0, 4, 1.0)]), step=1, **ADAM)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_matches_torch(isa: str, momentum: float, weight_decay: float) -> None:
    check_sgd(300, 5, momentum, weight_decay)


@pytest.mark.parametrize("size", (1, 37, 20000))
def test_adamw_matches_torch(isa: str, size: int) -> None:
    check_adamw(size, 5)


def test_adamw_refuses_other_dtypes() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg must"):
        adamw_(x, x, x.bfloat16(), x, step=1, **ADAM)
